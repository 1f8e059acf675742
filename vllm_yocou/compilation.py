"""Two units are compiled, each once: a pass through the self-decoder, called T times a step, and the cross-decoder.

vLLM drops the guards of compiled code, so whatever differs between two calls of a unit must reach it as a tensor.
"""

from collections.abc import Callable
from unittest.mock import patch

from torch import nn
from vllm import envs
from vllm.compilation.decorators import support_torch_compile
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.config import VllmConfig
from vllm.platforms import current_platform


def compiles(vllm_config: VllmConfig) -> bool:
    """On a CPU; CUDA's piecewise graphs would replay the first iteration's addresses in all of them."""
    return current_platform.is_cpu()


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
        cls = support_torch_compile(dynamic_arg_dims=dynamic_dims, enable_if=compiles)(cls)
        vllm_call = cls.__call__

        def __call__(self, *args):
            if self.do_not_compile:
                return vllm_call(self, *args)
            if self.compiled:
                return TorchCompileWithNoGuardsWrapper.__call__(self, *args)
            with patch.object(envs, "VLLM_USE_AOT_COMPILE", False):
                return vllm_call(self, *args)

        cls.__call__ = __call__
        return cls

    return decorate
