"""Checkpoints of the authors' serving fork (`model_type: "yoco"`): the same architecture under other names."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from vllm_yocou.checkpoints.mapping import Mapping, Source, by_name
from vllm_yocou.checkpoints.tensors import SourceTensor
from vllm_yocou.checkpoints.translation import refuse_unknown, translated, whole_number
from vllm_yocou.config import YocoUConfig

# Ours by theirs.
KEYS = {
    "universal_loop": "num_iterations",
    "n_layers": "num_hidden_layers",
    "head": "num_attention_heads",
    "kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "cross_head": "cross_num_attention_heads",
    "cross_kv_head": "cross_num_key_value_heads",
    "cross_head_dim": "cross_head_dim",
    "d_model": "hidden_size",
    "d_ffn": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
    "rope_theta": "rope_theta",
}
MOE_KEYS = {
    "moe_expert_num": "num_experts",
    "moe_top_k": "num_experts_per_tok",
    "moe_ffn_dim": "moe_intermediate_size",
    "d_shared_expert": "shared_expert_intermediate_size",
}
OTHER_KEYS = {"yoco_cross_layers", "yoco_window_size", "moe"}
GLOBAL_KV = {"yoco_norm": "norm", "k_proj": "k_proj", "v_proj": "v_proj"}


def recognise(folder: Path, keys: dict[str, Any], context: int | None) -> Source | None:
    """The checkpoint in `folder`, if the `keys` of its config.json are the authors'.

    Args:
        context: longest context in tokens, for sources that do not say.
    """
    if keys.get("model_type") == YocoUConfig.model_type:
        raise ValueError(
            f"the source is of model_type '{YocoUConfig.model_type}' already: there is nothing to convert."
        )
    if keys.get("model_type") != "yoco" or "yoco_window_size" not in keys:
        return None
    return Source(folder, partial(mapping, keys=keys, context=context))


def mapping(tensors: dict[str, SourceTensor], keys: dict[str, Any], context: int | None) -> Mapping:
    """What becomes of the tensors.

    Raises:
        ValueError: the source computes something that this architecture does not, or lacks a key.
    """
    config = _config(keys, context, gated=any(name.endswith("shared_expert_gate.weight") for name in tensors))
    return by_name(tensors, config, partial(_rename, self_layers=config.num_self_decoder_layers))


def _config(keys: dict[str, Any], context: int | None, gated: bool) -> YocoUConfig:
    moe = bool(keys.get("moe"))
    names = KEYS | (MOE_KEYS if moe else {})
    ours = translated(keys, names, context, required=("universal_loop", "norm_eps", "rope_theta"))
    if not ours.get("shared_expert_intermediate_size"):
        ours.pop("shared_expert_intermediate_size", None)
    if moe:
        # Every layer is a mixture: the dense width is not used, and the authors may leave it out.
        ours.setdefault("intermediate_size", ours.get("moe_intermediate_size"))
    cross_layers = whole_number(keys, "yoco_cross_layers")
    config = YocoUConfig(
        **ours,
        num_self_decoder_layers=whole_number(keys, "n_layers") - cross_layers,
        sliding_window=whole_number(keys, "yoco_window_size") + 1,  # FlashAttention's window (w, 0) sees w + 1 keys
        shared_expert_gate=gated,
    )
    refuse_unknown(keys, {*KEYS, *MOE_KEYS, *OTHER_KEYS}, config)
    return config


def _rename(name: str, self_layers: int) -> str | None:
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
        i, rest = int(layer[1]), layer[2]
        if i < self_layers:
            return f"model.self_decoder.layers.{i}.{rest}"
        return f"model.cross_decoder.layers.{i - self_layers}.{rest.replace('self_attn.', 'cross_attn.')}"
    if part := re.fullmatch(r"model\.(\w+)\.weight", name):
        return f"model.global_kv.{GLOBAL_KV[part[1]]}.weight" if part[1] in GLOBAL_KV else name
    return name if name == "lm_head.weight" else None
