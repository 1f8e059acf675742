"""CUDA's piecewise graphs as far as addresses go, on a CPU: a replay reads where the capture read and writes there.

What a graph of vLLM's replays is the same computation over the same memory, whatever the call was given. Here, a replay
is a call with the tensors of the first call, whose results overwrite those of the first call. Streams, memory pools and
kernels have no part in it.
"""

import torch
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.platforms.cpu import CpuPlatform

SIZES = [1, 2, 4, 8, 16, 32, 64]


class ReplayedGraph:
    """Takes the place of vLLM's CUDAGraphWrapper."""

    captures = replays = 0

    def __init__(self, runnable, vllm_config, runtime_mode, cudagraph_options=None):
        self.runnable, self.runtime_mode = runnable, runtime_mode
        self.captured = {}

    def __call__(self, *args):
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self.runtime_mode:
            return self.runnable(*args)
        rows = context.batch_descriptor
        if rows not in self.captured:
            self.captured[rows] = (args, self.runnable(*args))
            ReplayedGraph.captures += 1
            return self.captured[rows][1]
        args, result = self.captured[rows]
        for kept, fresh in zip(tensors(result), tensors(self.runnable(*args)), strict=True):
            kept.copy_(fresh)
        ReplayedGraph.replays += 1
        return result


def tensors(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def install() -> None:
    """Have vLLM compile on this CPU as it does for CUDA, in pieces between attention, with a graph for each piece."""
    check = CpuPlatform.check_and_update_config

    def as_on_cuda(vllm_config):
        check(vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.cudagraph_mode = CompilationMode.VLLM_COMPILE, CUDAGraphMode.PIECEWISE
        compilation.backend = "eager"  # of the pieces; CUDA's Inductor passes name operations that a CPU lacks
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, max(SIZES)
        compilation.compile_sizes = []

    CpuPlatform.check_and_update_config = staticmethod(as_on_cuda)
    CpuPlatform.get_static_graph_wrapper_cls = staticmethod(lambda: f"{__name__}.{ReplayedGraph.__name__}")
