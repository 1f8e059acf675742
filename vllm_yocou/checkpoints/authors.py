"""Folders that the authors exported for their serving fork (`model_type: "yoco"`)."""

from functools import partial
from pathlib import Path
from typing import Any

from vllm_yocou.checkpoints import authors_tensors
from vllm_yocou.checkpoints.authors_keys import VISION, read_keys
from vllm_yocou.checkpoints.mapping import Mapping, Origin, Source
from vllm_yocou.checkpoints.tensors import SourceTensor
from vllm_yocou.config import YocoUConfig

# Two other models are of this model_type; neither has one of these.
MARKS = ("yoco_cross_layers", "universal_loop", "yoco_window_size")
OLDER = {"model.yoco_k_proj.weight": "model.k_proj.weight", "model.yoco_v_proj.weight": "model.v_proj.weight"}


def recognise(folder: Path, keys: dict[str, Any], context: int | None) -> Source | None:
    """The checkpoint in `folder`, if the `keys` of its config.json are the authors'.

    Args:
        context: longest context in tokens, for sources that do not say.

    Raises:
        ValueError: there is nothing to convert, or it is a vision model.
    """
    if keys.get("model_type") == YocoUConfig.model_type:
        raise ValueError(
            f"the source is of model_type '{YocoUConfig.model_type}' already: there is nothing to convert."
        )
    if keys.get("model_type") == "yoco_vl":
        raise ValueError(f"the source is of model_type 'yoco_vl': {VISION}, convert a language model.")
    if keys.get("model_type") != "yoco" or not any(key in keys for key in MARKS):
        return None
    return Source(folder, partial(mapping, keys=keys, context=context))


def mapping(tensors: dict[str, SourceTensor], keys: dict[str, Any], context: int | None) -> Mapping:
    """What becomes of the tensors.

    Raises:
        ValueError: the source computes something that this architecture does not, or lacks a key.
    """
    found: dict[str, Origin] = {}
    for name, tensor in tensors.items():
        if name.endswith(".bias") and authors_tensors.dropped(name) is None:
            raise ValueError(
                f"the source has {name}: the authors' serving code leaves biases out in silence, so an exported folder "
                "does not say whether the model was trained with them, convert the trainer's state dict with its "
                "metadata.json."
            )
        newer = OLDER.get(name, name)
        found[name if newer in tensors else newer] = Origin(name, tensor)
    return authors_tensors.mapping(found, read_keys(keys, found, context, of_trainer=False))
