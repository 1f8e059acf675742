"""A plan accounts for every tensor of the source and of the new checkpoint before anything is written.

Making a checkpoint goes through one path, whatever the source: `sources.recognise` finds its schema, that schema's
module maps its tensors, `plan` checks the mapping against the config, and `write` carries the plan out. A new schema is
one file in this package, with `recognise` and `mapping` as in authors.py, and one entry in `sources.SOURCES`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_yocou.checkpoints.format import expected_shapes, stays_float32
from vllm_yocou.checkpoints.mapping import Origin, Source, refuse_misfits
from vllm_yocou.checkpoints.tensors import SourceTensor, read_tensors
from vllm_yocou.checkpoints.verify import CONVERTED
from vllm_yocou.config import YocoUConfig

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Step:
    """One tensor's way: its name there, its name here, what is read for it, and how that is stored here.

    Attributes:
        change: what is done to it on the way, in words; empty where nothing is.
    """

    source: str
    target: str
    tensor: SourceTensor
    dtype: torch.dtype
    change: str = ""

    @property
    def bytes(self) -> int:
        return torch.Size(self.tensor.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A checkpoint to be written, checked against its config and not begun.

    Attributes:
        source, destination: folders; the second does not exist yet.
        config: of the new checkpoint.
        steps: every tensor of the new checkpoint, in its order.
        left_out: source tensors that have no place in it, with the reason.
        notes: sentences for the user, about what the source leaves open.
    """

    source: Path
    destination: Path
    config: YocoUConfig
    steps: list[Step]
    left_out: dict[str, str]
    notes: Sequence[str] = ()

    def account(self) -> Iterator[str]:
        """A line for each tensor of the source: what becomes of it. One that becomes several has one line as well."""
        kinds: dict[tuple, list[Step]] = {}
        for step in self.steps:
            kinds.setdefault((step.source, step.change, step.tensor.shape, step.dtype), []).append(step)
        for (source, change, shape, dtype), steps in kinds.items():
            several = f" to {steps[-1].target}, {len(steps)} tensors of" if len(steps) > 1 else ""
            changed = f", {change}," if change else ""
            stored = f"{list(shape)} {dtype}".replace("torch.", "")
            yield f"{source}{changed} -> {steps[0].target}{several} {stored}"
        for name, reason in self.left_out.items():
            yield f"{name} -> left out: {reason}"


def refuse_existing(destination: Path) -> None:
    """Raise ValueError if there is something at `destination`: no checkpoint is written over anything."""
    if destination.exists():
        raise ValueError(f"{destination} already exists: give a new folder.")


def plan(source: Source, destination: Path, dtype: str | None = None) -> Plan:
    """Find out how `source` becomes a YOCO-U checkpoint in the folder `destination`.

    Args:
        dtype: of all tensors but those that stay float32, by default each one's own.

    Raises:
        ValueError: the source cannot be read; a tensor is missing, unexpected, misshapen or not of floating point; or
            `destination` exists already.
    """
    refuse_existing(destination)
    tensors = read_tensors(source.folder)
    mapping = source.mapping(tensors)
    steps, missing, misshapen = [], set(), []
    for target, shape in expected_shapes(mapping.config).items():
        origin = mapping.origins.get(target, Origin(target, None))
        name, tensor = origin.name, origin.tensor
        if tensor is None:
            missing.add(name)
        elif tensor.shape != shape:
            misshapen.append(f"{name} is {list(tensor.shape)} instead of {list(shape)}")
        elif tensor.dtype not in CONVERTED:  # eight bits would need scales
            misshapen.append(f"{name} is of {tensor.dtype}")
        else:
            stored = DTYPES[dtype] if dtype else tensor.dtype
            if stays_float32(mapping.config, target):
                stored = torch.float32
            steps.append(Step(name, target, tensor, stored, origin.change))
    refuse_misfits(missing, mapping.unexpected, misshapen)
    mapping.config.dtype = str(steps[0].dtype).removeprefix("torch.")
    return Plan(source.folder, destination, mapping.config, steps, mapping.left_out, mapping.notes)
