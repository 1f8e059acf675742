"""State dicts of the authors' trainer, with a `metadata.json` beside them whose `modelargs` are the config.

They hold what an exported folder has lost: biases and gates of heads.
"""

import re
from collections.abc import Mapping as Keys
from functools import partial
from pathlib import Path
from typing import Any

from vllm_yocou.checkpoints import authors_tensors
from vllm_yocou.checkpoints.authors_keys import read_keys
from vllm_yocou.checkpoints.authors_tensors import flattened, interleaved
from vllm_yocou.checkpoints.mapping import Mapping, Origin, Source, refuse_misfits
from vllm_yocou.checkpoints.tensors import SourceTensor

# The served name by the trainer's, up to the last dot.
TOP = {
    "tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "norm": "model.norm",
    "yoco_norm": "model.yoco_norm",
    "k_proj": "model.k_proj",
    "v_proj": "model.v_proj",
    "k_norm": "model.yoco_k_norm",
}
EXPERTS = {"mlp.w13": "mlp.experts.w13_weight", "mlp.w2": "mlp.experts.w2_weight"}
# Projections that are stored by heads.
BY_HEADS = r"(.*\.)?([qkv]_proj|lambda_proj|gate_proj)\.(weight|bias)"


def recognise(folder: Path, keys: dict[str, Any], context: int | None) -> Source | None:
    """The checkpoint in `folder`, if the `keys` of its metadata.json have the trainer's arguments.

    Args:
        context: longest context in tokens, for sources that do not say.
    """
    arguments = keys.get("modelargs")
    if not isinstance(arguments, dict):
        return None
    return Source(folder, partial(mapping, keys=arguments, context=context))


def mapping(tensors: dict[str, SourceTensor], keys: dict[str, Any], context: int | None) -> Mapping:
    """What becomes of the tensors.

    Raises:
        ValueError: the source computes something that this architecture does not, or lacks a key.
    """
    found: dict[str, Origin] = {}
    for name, tensor in tensors.items():
        served = _served(name, keys)
        if served in found:
            refuse_misfits(unexpected=[f"{name} beside {found[served].name}"])
        origin = Origin(name, tensor)
        if ".mlp." not in served and (found_by_heads := re.fullmatch(BY_HEADS, served)):
            origin = flattened(origin, last=1 if found_by_heads[3] == "weight" else 0)
        found[served] = origin
    reading = read_keys(keys, found, context, of_trainer=True)
    if reading.gates_by_half:
        found |= {name: interleaved(found[name]) for name in found if name.endswith(".lambda_proj.weight")}
    return authors_tensors.mapping(found, reading)


def _served(name: str, keys: Keys[str, Any]) -> str:
    """The name in the authors' serving fork; names that the trainer does not have stay as they are."""
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if layer is None:
        return name
    rest = EXPERTS.get(layer[2], layer[2]).replace("mlp.shared.", "mlp.shared_experts.")
    if not keys.get("headwise_glu"):  # both kinds of gates have one name
        rest = rest.replace("self_attn.gate_proj.", "self_attn.lambda_proj.")
    return f"model.layers.{layer[1]}.{rest}"
