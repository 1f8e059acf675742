"""A damaged or foreign checkpoint ends in one error that names what is wrong with it, and is never served.

The loader compares what it is given with the table of `format`, so a wrong checkpoint ends in one error that names the
missing, unexpected and misshapen tensors, the first six of each kind. Damage that leaves the names and shapes as they
are is seen as far as it makes a file unreadable or a number NaN or infinite. Weights that are sent to a running engine
come in parts, so nothing can be missing of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_yocou.checkpoints.format import can_be_quantized, deviations, expected_shapes, listed, undecided_shapes
from vllm_yocou.checkpoints.tensors import weight_files
from vllm_yocou.config import YocoUConfig

# What a quantization method calls the numbers of a matrix themselves.
NUMBERS = ("weight", "weight_packed", "qweight")
# Among these a load converts; whole numbers and eight bits mean something only together with their scales.
CONVERTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Stored:
    """What a served model's checkpoint holds under a name; without a dtype, any floating-point type."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    def deviation(self, tensor: torch.Tensor) -> str | None:
        """How a tensor that is sent differs, to be read after its name."""
        if tuple(tensor.shape) != self.shape:
            return f"is {list(tensor.shape)} instead of {list(self.shape)}"
        if self.dtype is None:
            return None if tensor.is_floating_point() else f"is of {tensor.dtype} instead of a floating-point type"
        if tensor.dtype == self.dtype or {tensor.dtype, self.dtype} <= set(CONVERTED):
            return None
        return f"is of {tensor.dtype} instead of {self.dtype}"


def check_files(folder: Path) -> None:
    """Raise ValueError for a file of weights that is not there or not whole; reads their headers only.

    vLLM would find out long after this, in an error that does not name the file.
    """
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({error}): fetch or convert the checkpoint again.") from None


def verified(
    weights: Iterable[tuple[str, torch.Tensor]], config: YocoUConfig, quantized: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass on the tensors that fit; then raise ValueError for what was missing, unexpected, misshapen, doubled or NaN.

    A quantized checkpoint stores several tensors for a matrix, under names of its method. Every matrix must have those
    that others of its kind have: vLLM would leave what is missing of them as it was allocated.
    """
    undecided = undecided_shapes(config)
    expected = expected_shapes(config) | undecided
    missing, unexpected, misshapen, not_finite = set(expected), [], [], []
    stored: dict[str, dict[str, torch.dtype]] = {}
    seen, twice = set(), []
    for name, tensor in weights:
        if name in seen:
            twice.append(name)
        seen.add(name)
        matrix, _, part = name.rpartition(".")
        # A bias beside a quantized matrix is stored as ever, and so are matrices that are served unquantized.
        belongs = quantized and can_be_quantized(matrix) and len(expected.get(f"{matrix}.weight", ())) == 2
        belongs = belongs and (part == "weight" or name not in expected)
        missing.discard(f"{matrix}.weight" if belongs else name)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # Some writers store tied embeddings twice; the embedding's copy is the one in use.
        if not _is_finite(tensor):
            not_finite.append(name)
        if belongs:
            stored.setdefault(matrix, {})[part] = tensor.dtype
        if belongs and part != "weight":
            yield name, tensor
        elif name not in expected:
            unexpected.append(name)
        elif tuple(tensor.shape) != expected[name]:
            misshapen.append(f"{name} is {list(tensor.shape)} instead of {list(expected[name])}")
        elif not quantized and not tensor.is_floating_point():
            misshapen.append(f"{name} is of {tensor.dtype} instead of a floating-point type")
        else:
            yield name, tensor
    if missing.issuperset(undecided):
        missing.difference_update(undecided)
    missing.update(_missing_parts(stored))
    if problems := deviations(sorted(missing), unexpected, misshapen):
        raise ValueError(
            f"the checkpoint does not fit its config.json, {problems}. Correct the config or convert again."
        )
    if twice:
        raise ValueError(
            f"the checkpoint holds {listed(twice)} twice: without an index vLLM loads every *.safetensors file in a "
            "folder, move those of other models elsewhere."
        )
    if not_finite:
        raise ValueError(
            f"the checkpoint holds NaN or infinity in {listed(not_finite)}: its training diverged or the file is "
            "damaged, fetch or convert it again."
        )


def check_part(part: Mapping[str, torch.Tensor], stored: Mapping[str, Stored]) -> None:
    """Raise ValueError if a tensor that is sent to a running engine is unexpected, misshapen or not finite.

    Args:
        part: by name, in the checkpoint's spelling.
        stored: what the served model's checkpoint holds.
    """
    known = {name: tensor for name, tensor in part.items() if name in stored}
    differing = {name: stored[name].deviation(tensor) for name, tensor in known.items()}
    misshapen = [f"{name} {deviation}" for name, deviation in differing.items() if deviation]
    if problems := deviations([], [name for name in part if name not in stored], misshapen):
        raise ValueError(
            f"the weights that were sent do not fit the served model, {problems}. Nothing of this part was loaded, "
            "send it as the checkpoint has it."
        )
    if not_finite := [name for name, tensor in known.items() if not _is_finite(tensor)]:
        raise ValueError(
            f"the weights that were sent hold NaN or infinity in {listed(not_finite)}: nothing of this part was "
            "loaded, go back to a checkpoint from before the training diverged."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # The extremes propagate NaN, and are found in the time of a copy; isfinite() takes fifteen times as long. float8
    # has no extremes of its own.
    low, high = (tensor if tensor.itemsize > 1 else tensor.bfloat16()).aminmax()
    return bool(low.isfinite() & high.isfinite())


def _missing_parts(stored: dict[str, dict[str, torch.dtype]]) -> Iterator[str]:
    """Names of what a quantized matrix lacks and others have whose numbers are of the same dtype."""
    kinds: dict[torch.dtype | None, set[str]] = {}
    for parts in stored.values():
        kinds.setdefault(_dtype_of_numbers(parts), set()).update(parts)
    for matrix, parts in stored.items():
        dtype = _dtype_of_numbers(parts)
        # Without its numbers a matrix is of a kind that has all the rest.
        alike = [kinds[dtype]] if dtype is not None else [kind for kind in kinds.values() if kind > set(parts)]
        yield from (f"{matrix}.{part}" for part in set().union(*alike) - set(parts))


def _dtype_of_numbers(parts: dict[str, torch.dtype]) -> torch.dtype | None:
    return next((parts[part] for part in NUMBERS if part in parts), None)
