"""Two units are compiled, each once: a pass through the self-decoder, called T times a step, and the cross-decoder.

vLLM drops the guards of compiled code, so whatever differs between two calls of a unit must reach it as a tensor. Its
key of compiled code holds the model's config without T (`YocoUConfig.uuid`), since a unit knows nothing of T.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from vllm_yocou.serving.caches import CROSS_ATTENTION, WINDOW_ATTENTION
from vllm_yocou.workarounds import loading_of_saved_code


def prepare_cuda_graphs(compilation_config: CompilationConfig) -> None:
    """Let vLLM's CUDA graphs work with a unit that is called T times a step.

    A graph replays the addresses that it captured, and vLLM keeps one graph for each piece of a unit and number of
    rows: all T calls replay the same. So every call must find its input where the first one had it. vLLM does that
    itself if asked: it copies a unit's inputs into buffers of its own, N · D values a call, and what one call returns
    is copied before the next call overwrites it. The alternative, T graphs of distinct addresses, takes T times as many
    captures and as much memory. The window attention, which reads the iteration on the host, runs between the pieces
    of a piecewise graph; a full graph of decodes captures all T calls with their attention, one after the other.
    """
    # vLLM turns FULL into this itself once it hears that our builder's graphs hold decodes alone. By then it has
    # compiled the units without pieces, and mixed batches would run without graphs.
    if compilation_config.cudagraph_mode == CUDAGraphMode.FULL and compilation_config.splitting_ops:
        compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    # Without pieces nothing replays a unit, and copies would be in the way of vLLM's ahead-of-time cache.
    compilation_config.cudagraph_copy_inputs = compilation_config.cudagraph_mode.has_piecewise_cudagraphs()
    # vLLM has chosen its splitting_ops by now; where it splits nowhere, nothing is captured in pieces.
    if compilation_config.splitting_ops:
        ours = {WINDOW_ATTENTION, CROSS_ATTENTION} - set(compilation_config.splitting_ops)
        compilation_config.splitting_ops.extend(sorted(ours))


class PieceCapture:
    """Tells the step in which vLLM captures the pieces of a compiled model from the steps that replay them.

    In that step the self-decoder must run once: its second call would replay what the first has just captured, and
    custom all-reduce sets the pointers that a graph reads only after the last capture. Nobody reads what the step
    computes.
    """

    def __init__(self, compilation_config: CompilationConfig):
        self.compilation_config = compilation_config
        self.pieces: list[CUDAGraphWrapper] = []
        self.seen = 0  # wrappers of the whole process, when `pieces` was made

    def is_running(self) -> bool:
        """Asked before the first piece of a step runs; all pieces that a step runs are captured in the same one.

        vLLM may compile pieces of their own for a range of sizes, so a piece without a graph of this size says nothing.
        """
        context = get_forward_context()
        if context.cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE:
            return False
        if self.seen != len(CUDAGraphWrapper._all_instances):
            self.pieces = [piece for piece in CUDAGraphWrapper._all_instances if self.is_ours(piece)]
            self.seen = len(CUDAGraphWrapper._all_instances)
        captured = any(context.batch_descriptor in piece.concrete_cudagraph_entries for piece in self.pieces)
        return bool(self.pieces) and not captured

    def is_ours(self, piece: CUDAGraphWrapper) -> bool:
        """Whether it is a piece of this engine's model, as other engines of the process have theirs."""
        is_piece = piece.runtime_mode == CUDAGraphMode.PIECEWISE
        return is_piece and piece.compilation_config is self.compilation_config


def warmed_up_by_one_pass(vllm_config: VllmConfig) -> bool:
    """Whether a step without requests may run the self-decoder once instead of T times.

    On a CPU such a step only compiles the units, or loads them, and all T passes are the same unit. On a GPU it may be
    the capture of a graph, and an idle data-parallel rank must take part in every collective operation of the others.
    """
    return current_platform.is_cpu() and vllm_config.parallel_config.data_parallel_size == 1


@contextmanager
def without_piecewise_graphs() -> Iterator[None]:
    """For a call of a unit with fewer rows than the step has: vLLM finds piecewise graphs by the step's rows."""
    context = get_forward_context()
    before = context.cudagraph_runtime_mode
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.cudagraph_runtime_mode = before


def compiled_unit(**dynamic_dims: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """vLLM's `support_torch_compile`, whose ahead-of-time cache loads on a CPU too.

    Args:
        dynamic_dims: for each tensor argument of `forward` with rows, the dimension that counts them.
    """

    def decorate(unit: type[nn.Module]) -> type[nn.Module]:
        unit = support_torch_compile(dynamic_arg_dims={**dynamic_dims})(unit)
        vllm_call = unit.__call__

        def __call__(self: Any, *args: torch.Tensor) -> torch.Tensor:
            # Every call of every step comes by here, and only a unit's first one needs the workaround.
            if self.do_not_compile or self.compiled or getattr(self, "aot_compiled_fn", None) is not None:
                return vllm_call(self, *args)
            with loading_of_saved_code():
                return vllm_call(self, *args)

        unit.__call__ = __call__  # type: ignore[method-assign]  # as vllm's own decorator does
        return unit

    return decorate
