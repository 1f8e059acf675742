"""Batch invariance on a CPU: a request's numbers do not depend, in a single bit, on what else the engine computes.

vLLM's variable VLLM_BATCH_INVARIANT asks for it, and vLLM itself keeps it on GPUs alone. On a CPU this plugin fixes
what depends on the other rows of a step: the shapes of products (fixed_tiles.py), the split of attention
(row_by_row.py), and where torch's vectors end (fixed_sigmoid.py). Everything else is computed row by row already.
Settings for which that has not been shown are refused.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

WORKER = "vllm_yocou.serving.invariant_worker.InvariantWorker"
VARIABLE = "VLLM_BATCH_INVARIANT=1"
# With a window its rows move with the edges of chunks, with one split too: seen with FlashAttention 3 on an H200.
NOT_INVARIANT = "FLASH_ATTN"


def is_fixed() -> bool:
    """Whether this process computes with fixed shapes."""
    from vllm import envs
    from vllm.platforms import current_platform

    return bool(envs.VLLM_BATCH_INVARIANT) and current_platform.is_cpu()


def breaks_promise(backend: str) -> bool:
    """Whether an attention backend's rows vary, where that must not be."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT) and backend == NOT_INVARIANT


def check_backend(backend: str) -> None:
    if breaks_promise(backend):
        raise ValueError(
            f"the attention backend {backend} cannot be used with {VARIABLE}: what it computes in a window depends on "
            "where chunks end, choose TRITON_ATTN."
        )


def check_batch_invariance(vllm_config: "VllmConfig") -> None:
    """Refuse settings under which nothing has shown that the promise holds."""
    from vllm import envs
    from vllm.platforms import current_platform

    asked = bool(int(os.environ.get("VLLM_BATCH_INVARIANT", "0")))
    if current_platform.is_cpu() and asked != bool(envs.VLLM_BATCH_INVARIANT):
        raise ValueError(
            "VLLM_BATCH_INVARIANT cannot be changed while an engine lives in this process: vLLM keeps the value that "
            "it found, end the engine or start the next one in a process of its own."
        )
    if (backend := vllm_config.attention_config.backend) is not None:
        check_backend(backend.name)
    if not is_fixed():
        return
    parallel, model_config = vllm_config.parallel_config, vllm_config.model_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    reasons = {
        f"quantization ({model_config.quantization})": (
            model_config.quantization is not None,
            "vLLM's kernels for it choose the order of a sum by the number of rows, serve plain weights",
        ),
        f"--kv-cache-dtype {cache_dtype}": (
            cache_dtype not in ("auto", "float32", "float16", "bfloat16"),
            "attention over such a cache has not been shown to keep every bit, leave it out",
        ),
        "--enable-lora": (
            vllm_config.lora_config is not None,
            "products with adapters have the shapes of a step, merge the adapter into the weights",
        ),
        f"--tensor-parallel-size {parallel.tensor_parallel_size}": (
            parallel.tensor_parallel_size > 2,
            "the sum of more than two ranks depends on its order, use 2 at most",
        ),
        f"--runner {model_config.runner_type}": (
            model_config.runner_type != "generate",
            "layers that vLLM adds to a model for it have the shapes of a step, leave it out",
        ),
        "data-parallel ranks that share experts": (
            parallel.data_parallel_size > 1 and model_config.is_moe,
            "they compute each other's rows, start one server for each engine",
        ),
        f"--worker-cls {parallel.worker_cls}": (
            parallel.worker_cls not in ("auto", WORKER),
            "the plugin brings a worker of its own for it, leave it out",
        ),
    }
    for thing, (is_asked_for, reason) in reasons.items():
        if is_asked_for:
            raise ValueError(f"{thing} cannot be used with {VARIABLE} on a CPU: {reason}.")


def choose_worker(vllm_config: "VllmConfig") -> None:
    """Let the plugin's worker start the engine: vLLM's would put kernels for GPUs in place of a CPU's."""
    if is_fixed():
        vllm_config.parallel_config.worker_cls = WORKER


@contextmanager
def experts_accepted() -> Iterator[None]:
    """While experts are made: vLLM refuses a CPU's, and does not know what computes them here (looped_experts.py)."""
    if not is_fixed():
        yield
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    with patch.object(CPUUnquantizedExperts, "_supports_batch_invariance", staticmethod(lambda: True)):
        yield
