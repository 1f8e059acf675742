"""How a source's tensors become a YOCO-U checkpoint's: every source tensor is mapped, or left out with a reason.

The modules of the schemas make mappings; `plan` checks them against the config and knows nothing of schemas.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_yocou.checkpoints.format import deviations, expected_shapes
from vllm_yocou.checkpoints.tensors import SourceTensor
from vllm_yocou.config import YocoUConfig
from vllm_yocou.rope import ROPE_TYPES, inverse_frequencies


@dataclass(frozen=True)
class Origin:
    """Where a tensor here comes from.

    Attributes:
        name: of the tensor there, or what takes its place.
        tensor: what is taken of it; None if the source does not have it.
        change: what is done to it on the way, in words; empty where nothing is.
    """

    name: str
    tensor: SourceTensor | None
    change: str = ""


@dataclass(frozen=True)
class Mapping:
    """What becomes of a source's tensors.

    Attributes:
        config: of the YOCO-U checkpoint.
        origins: by the name here. A tensor there may have several places here, whole or in parts.
        left_out: name there -> why it has no place here.
        unexpected: names there that have neither a place nor such a reason.
        notes: sentences for the user, about what the source leaves open.
    """

    config: YocoUConfig
    origins: dict[str, Origin]
    left_out: dict[str, str]
    unexpected: list[str]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Source:
    """A checkpoint whose schema is known and whose tensors are unread.

    Attributes:
        folder: where it is.
        mapping: what becomes of its tensors, given by name.
        layers: (layer here, source layer of its attention, source layer of its feed-forward) in the order of
            computation, with layers there counted from 0; empty where every layer keeps its place.
    """

    folder: Path
    mapping: Callable[[dict[str, SourceTensor]], Mapping]
    layers: Sequence[tuple[str, int, int | None]] = ()


def by_name(tensors: dict[str, SourceTensor], config: YocoUConfig, rename: Callable[[str], str | None]) -> Mapping:
    """The mapping of a schema in which every tensor has one place at most.

    Args:
        rename: the name here of a tensor there, or None for one that has no place.
    """
    expected = expected_shapes(config)
    mapping = Mapping(config, {}, {}, [])
    for name, tensor in tensors.items():
        target = rename(name)
        if reason := redundant(name, tensor, config, is_head=target == "lm_head.weight"):
            mapping.left_out[name] = reason
        elif target in expected:
            mapping.origins[target] = Origin(name, tensor)
        else:
            mapping.unexpected.append(name)
    return mapping


def refuse_misfits(missing: Iterable[str] = (), unexpected: Sequence[str] = (), misshapen: Sequence[str] = ()) -> None:
    """Raise ValueError if there are tensors in which a source differs from its config; each kind is given by name."""
    if problems := deviations(sorted(missing), list(unexpected), list(misshapen)):
        raise ValueError(f"the source does not fit its config, {problems}. Correct the config or the source.")


def redundant(name: str, tensor: SourceTensor, config: YocoUConfig, is_head: bool) -> str | None:
    """Why a tensor of a source holds nothing of its own, if it does not."""
    if name.endswith("rotary_emb.inv_freq") and _follows_from(config, tensor):
        return "follows from the config"
    return "a second copy of the tied embeddings" if is_head and config.tie_word_embeddings else None


def _follows_from(config: YocoUConfig, frequencies: SourceTensor) -> bool:
    rope = config.rope_parameters
    tables = [rope]
    if ROPE_TYPES[rope["rope_type"]]:
        # transformers once kept those of scaled types unscaled, and divided the positions.
        tables.append({"rope_type": "default", "rope_theta": rope["rope_theta"]})
    if frequencies.shape != (config.head_dim // 2,):
        return False
    found = frequencies.read().float()
    own = (inverse_frequencies(config.head_dim, table, torch.float32) for table in tables)
    return any(torch.allclose(found, expected, rtol=1e-2) for expected in own)
