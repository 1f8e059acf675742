"""Routed experts whose SwiGLU is clamped are computed by kernels that clamp, or the model is refused.

Most of vLLM's kernels for experts ignore the limit in silence.
"""

from typing import Any

from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

# vLLM's classes of experts that clamp whatever the weights are stored in, and those that clamp unquantized ones.
CLAMPING = ("TritonExperts", "BatchedTritonExperts", "TritonWNA16Experts", "MarlinExperts")
CLAMPING_UNQUANTIZED = (*CLAMPING, "FlashInferExperts")


class ClampedExperts(RoutedExperts):
    """vLLM's routed experts, by a kernel that honours `swiglu_limit`.

    Raises:
        ValueError: vLLM has chosen one that does not.
    """

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        method = super()._get_quant_method(prefix, quant_config, moe_config)
        unquantized = type(method) is UnquantizedFusedMoEMethod
        if unquantized and current_platform.is_cpu():
            from vllm_yocou.serving.looped_experts import LoopedMethod  # not before: what it extends is a CPU's

            return LoopedMethod(moe_config)
        experts = getattr(getattr(method, "experts_cls", None), "__name__", type(method).__name__)
        if experts not in (CLAMPING_UNQUANTIZED if unquantized else CLAMPING):
            raise ValueError(
                f"swiglu_limit {moe_config.swiglu_limit} cannot be used with vLLM's {experts}: they do not clamp what "
                f"routed experts compute, {remedy(unquantized)}."
            )
        return method


def remedy(unquantized: bool) -> str:
    if unquantized:
        return "use --moe-backend triton"
    return "use a checkpoint whose experts are not quantized"
