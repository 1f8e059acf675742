"""Two units are compiled, each once: a pass through the self-decoder, called T times a step, and the cross-decoder.

vLLM drops the guards of compiled code, so whatever differs between two calls of a unit must reach it as a tensor.
"""

from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch

from torch import nn
from vllm import envs
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import CompilationConfig, CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from vllm_yocou.attention import WINDOW_ATTENTION


def prepare_cuda_graphs(compilation_config: CompilationConfig) -> None:
    """Let vLLM's CUDA graphs work with a unit that is called T times a step.

    A graph replays the addresses that it captured, and vLLM keeps one graph for each piece of a unit and number of
    rows: all T calls replay the same. So every call must find its input where the first one had it. vLLM does that
    itself if asked: it copies a unit's inputs into buffers of its own, N · D values a call, and what one call returns
    is copied before the next call overwrites it. The alternative, T graphs of distinct addresses, takes T times as many
    captures and as much memory. The window attention, which reads the iteration on the host, runs between the pieces
    of a piecewise graph; a full graph of decodes captures all T calls with their attention, one after the other.
    """
    compilation_config.cudagraph_copy_inputs = True
    # vLLM has chosen by now; where it splits nowhere, nothing is captured in pieces.
    if compilation_config.splitting_ops and WINDOW_ATTENTION not in compilation_config.splitting_ops:
        compilation_config.splitting_ops.append(WINDOW_ATTENTION)


@contextmanager
def without_piecewise_graphs():
    """For a call of a unit with fewer rows than the step has: vLLM finds piecewise graphs by the step's rows."""
    context = get_forward_context()
    before = context.cudagraph_runtime_mode
    context.cudagraph_runtime_mode = CUDAGraphMode.NONE
    try:
        yield
    finally:
        context.cudagraph_runtime_mode = before


def compiled_unit(**dynamic_dims: int) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """vLLM's `support_torch_compile`, without its ahead-of-time cache on a CPU, which there cannot load what it saved.

    That cache is a setting of the whole process, VLLM_USE_AOT_COMPILE, which vLLM may have read for good before a unit
    is first called (it does so in the workers of tensor parallelism). So it is off in vLLM's eyes for the length of a
    unit's first call, and no other model sees it; later calls go straight to what the first has compiled. Inductor's
    own cache makes the next start quick.

    Args:
        dynamic_dims: for each tensor argument of `forward` with rows, the dimension that counts them.
    """

    def decorate(cls: type[nn.Module]) -> type[nn.Module]:
        cls = support_torch_compile(dynamic_arg_dims=dynamic_dims)(cls)
        vllm_call = cls.__call__

        def __call__(self, *args):
            if self.do_not_compile or not current_platform.is_cpu():
                return vllm_call(self, *args)
            if self.compiled:
                return TorchCompileWithNoGuardsWrapper.__call__(self, *args)
            with patch.object(envs, "VLLM_USE_AOT_COMPILE", False):
                return vllm_call(self, *args)

        cls.__call__ = __call__
        return cls

    return decorate
