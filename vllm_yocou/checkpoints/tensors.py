"""The tensors of a checkpoint's files, unread until they are asked for: no source is ever held in memory whole.

Pickles are read without executing what they hold.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source, unread: `at` maps what an index selects from its file, and no more of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    at: Callable[[Any], torch.Tensor]

    @classmethod
    def mapped(cls, tensor: torch.Tensor) -> "SourceTensor":
        """Of a tensor that torch has mapped from its file already."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.__getitem__)

    def read(self) -> torch.Tensor:
        return self.at(...)

    def part(self, *index: int | slice) -> "SourceTensor":
        """What `index` selects of it, unread: reading that maps nothing else."""
        shape = tuple(torch.empty(self.shape, device="meta")[index].shape)
        return SourceTensor(shape, self.dtype, lambda further: self.at(index)[further])

    def changed(
        self, change: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> "SourceTensor":
        """What `change` makes of it, once it is read: a tensor of `dtype` and `shape`."""
        return SourceTensor(shape, dtype, lambda index: change(self.read())[index])


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, or without an index all that are not hidden.

    Raises:
        ValueError: the index is malformed.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("[!.]*.safetensors"))
    try:
        return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is not an index of safetensors files ({error!r}): fetch or convert the checkpoint again."
        ) from None


def source_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a source: safetensors, or pickles where there are none.

    Raises:
        ValueError: there are neither.
    """
    files = weight_files(folder) or sorted(path for path in folder.glob("*") if path.suffix in PICKLES)
    if not files:
        raise ValueError(f"{folder} holds no weights: give a folder with *.safetensors or {', '.join(PICKLES)} files.")
    return files


def read_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Every tensor of the weight files in `folder`, by name.

    Raises:
        ValueError: there are no such files, one of them is damaged, or two hold a tensor of the same name.
    """
    found: dict[str, SourceTensor] = {}
    for file in source_files(folder):
        for name, tensor in _safetensors(file) if file.suffix == ".safetensors" else _pickled(file):
            if name in found:
                raise ValueError(
                    f"{name} is in more than one file of {folder}: merge the parts of a model-parallel run first."
                )
            found[name] = tensor
    return found


def _safetensors(path: Path) -> Iterator[tuple[str, SourceTensor]]:
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it again.") from error
    for name in file.keys():  # noqa: SIM118 (not a dictionary)
        part = file.get_slice(name)
        empty = part[:0] if part.get_shape() else file.get_tensor(name)  # for its dtype as torch has it
        yield name, SourceTensor(tuple(part.get_shape()), empty.dtype, part.__getitem__)


def _pickled(path: Path) -> Iterator[tuple[str, SourceTensor]]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects besides tensors, and nothing of it was executed: save the bare state dict."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole file of torch.save ({str(error).splitlines()[0]}): save it again with torch 1.6 or "
            "later."
        ) from error
    if isinstance(state, dict) and list(state) == ["model"]:
        state = state["model"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{path} is not a dictionary of tensors alone: save the bare state dict.")
    for name, tensor in state.items():
        yield name, SourceTensor.mapped(tensor)
