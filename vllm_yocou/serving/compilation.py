"""Two units are compiled, each once: a pass through the self-decoder, called T times a step, and the cross-decoder.

vLLM drops the guards of compiled code, so whatever differs between two calls of a unit must reach it as a tensor.
"""

from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform

from vllm_yocou.serving.caches import WINDOW_ATTENTION


def prepare_cuda_graphs(compilation_config: CompilationConfig) -> None:
    """Let vLLM's CUDA graphs work with a unit that is called T times a step.

    A graph replays the addresses that it captured, and vLLM keeps one graph for each piece of a unit and number of
    rows: all T calls replay the same. So every call must find its input where the first one had it. vLLM does that
    itself if asked: it copies a unit's inputs into buffers of its own, N · D values a call, and what one call returns
    is copied before the next call overwrites it. The alternative, T graphs of distinct addresses, takes T times as many
    captures and as much memory. The window attention, which reads the iteration on the host, runs between the pieces
    of a piecewise graph; a full graph of decodes captures all T calls with their attention, one after the other.
    """
    # Without pieces nothing replays a unit, and vLLM's ahead-of-time cache fails to load one that was told to copy.
    compilation_config.cudagraph_copy_inputs = compilation_config.cudagraph_mode.has_piecewise_cudagraphs()
    # vLLM has chosen its splitting_ops by now; where it splits nowhere, nothing is captured in pieces.
    if compilation_config.splitting_ops and WINDOW_ATTENTION not in compilation_config.splitting_ops:
        compilation_config.splitting_ops.append(WINDOW_ATTENTION)


def warmed_up_by_one_pass(vllm_config: VllmConfig) -> bool:
    """Whether a step without requests may run the self-decoder once instead of T times.

    On a CPU such a step only compiles the units, or loads them, and all T passes are the same unit. On a GPU it may be
    the capture of a graph, and an idle data-parallel rank must take part in every collective operation of the others.
    """
    return current_platform.is_cpu() and vllm_config.parallel_config.data_parallel_size == 1


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
    """vLLM's `support_torch_compile`, whose ahead-of-time cache serves every T, and loads on a CPU too.

    For the length of a unit's first call, two things are other than they are:

    - `num_iterations` is 0. vLLM's key of compiled code takes in the whole config, but a unit knows nothing of T.
    - Torch's loader gives what it loads a `finalize_loading`. vLLM calls that on all compiled code and only its own
      backend's has one, so in the mode that a CPU has vLLM 0.32 would refuse what it saved, and compile in every start.

    Args:
        dynamic_dims: for each tensor argument of `forward` with rows, the dimension that counts them.
    """

    def decorate(cls: type[nn.Module]) -> type[nn.Module]:
        cls = support_torch_compile(dynamic_arg_dims=dynamic_dims)(cls)
        vllm_call = cls.__call__

        def __call__(self, *args):
            later = self.do_not_compile or self.compiled or getattr(self, "aot_compiled_fn", None) is not None
            if later:
                return vllm_call(self, *args)
            with (
                patch.object(self.vllm_config.model_config.hf_config, "num_iterations", 0),
                patch.object(torch.compiler, "load_compiled_function", load_compiled_function),
            ):
                return vllm_call(self, *args)

        cls.__call__ = __call__
        return cls

    return decorate


def load_compiled_function(*args, load=torch.compiler.load_compiled_function, **kwargs):
    """Torch's loader of saved compiled code, for vLLM, which asks the code to finish loading."""
    loaded = load(*args, **kwargs)
    code = loaded._artifacts.compiled_fn
    if not hasattr(code, "finalize_loading"):
        code.finalize_loading = lambda vllm_config: None
    return loaded
