"""What the check serves: three tiny models with random weights, or a checkpoint that fits beside its reference."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference import YocoUForCausalLM

# Eight heads, so that up to eight ranks can share them. A head is of 32 numbers, the fewest that vLLM's CPU attention
# takes.
SIZES: dict[str, Any] = dict(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=4,
    num_self_decoder_layers=2,
    sliding_window=16,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
)
EXPERTS: dict[str, Any] = dict(
    num_experts=6, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64
)
TINY: dict[str, dict[str, Any]] = {
    "dense, RoPE, qk_norm, T = 3": SIZES | dict(num_iterations=3, qk_norm="all", cross_decoder_rope=True),
    "dense, NoPE, T = 1": SIZES | dict(num_iterations=1),
    "mixture of experts, T = 3": SIZES | EXPERTS | dict(num_iterations=3),
}
LONGEST = 1024  # tokens of a checkpoint's context that the check uses
DOUBLE_BYTES = 8
MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Model:
    """A checkpoint under the name that the report gives it; `context` is the most tokens of a request."""

    name: str
    folder: str
    config: YocoUConfig

    @property
    def context(self) -> int:
        return min(self.config.max_position_embeddings, LONGEST)

    def reference(self, dtype: torch.dtype, device: str) -> YocoUForCausalLM:
        """The reference model over the same weights, rounded to `dtype` as vLLM rounds them."""
        return YocoUForCausalLM.from_pretrained(self.folder, dtype=dtype).eval().to(device)


@contextmanager
def tiny_models() -> Iterator[list[Model]]:
    """The three tiny models, in files that are gone afterwards."""
    with TemporaryDirectory(prefix="vllm-yocou-check-") as folder:
        yield [
            _written(name, Path(folder) / str(number), YocoUConfig(**keys))
            for number, (name, keys) in enumerate(TINY.items())
        ]


def _written(name: str, folder: Path, config: YocoUConfig) -> Model:
    """Weights so large that every layer moves the logits, norm weights away from one, the same at every writing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = YocoUForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.08)
                else:
                    parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return Model(name, str(folder), config)


def checkpoint(name: str, parameters: int, dtype: str, device: str) -> Model:
    """The checkpoint in the folder `name`, or of that name on the Hugging Face hub.

    Args:
        parameters: how many it stores.
        dtype: that it is to be served in, or "auto" for the one that its config names.

    Raises:
        ValueError: it is quantized, or does not fit into the memory of `device` beside its reference.
    """
    config = YocoUConfig.from_pretrained(name)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantized, and the reference model is not: check the checkpoint it was made from.")
    for place, needed in needed_bytes(parameters, element_bytes(config, dtype, device), device).items():
        if needed > (available := available_bytes(place)):
            raise ValueError(
                f"{name} needs {needed / 2**30:.1f} GiB beside its reference in float64 and {available / 2**30:.1f} "
                f"GiB are available on the device {place}: check a smaller checkpoint, or leave it out to check tiny "
                "models."
            )
    return Model(name, name, config)


def element_bytes(config: YocoUConfig, dtype: str, device: str) -> int:
    """Bytes of a weight in `dtype`; for "auto" in what vLLM makes of the one that the config names."""
    named = (config.dtype or torch.float32) if dtype == "auto" else dtype
    width = (getattr(torch, named) if isinstance(named, str) else named).itemsize
    return min(width, 2) if dtype == "auto" and device != "cpu" else width


def reference_device(device: str) -> str:
    """Where the reference is computed: with VLLM_BATCH_INVARIANT vLLM's own products, without float64, replace torch's.

    They stay in force on a GPU for the life of the process.
    """
    from vllm import envs

    return "cpu" if envs.VLLM_BATCH_INVARIANT else device


def needed_bytes(parameters: int, width: int, device: str) -> dict[str, int]:
    """By device, of the served weights, and of the reference in their dtype, of `width` bytes, and in float64."""
    needed = {device: parameters * width}
    place = reference_device(device)
    needed[place] = needed.get(place, 0) + parameters * (width + DOUBLE_BYTES)
    return needed


def available_bytes(device: str) -> int:
    """Memory that is not in use, of the first GPU or of this machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info(0)[0]
    if MEMORY.exists():
        for line in MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
