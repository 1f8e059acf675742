"""Experts that clamp, or that ranks share on a CPU, are computed by what can do that, or the model is refused.

Most of vLLM's kernels for experts ignore the limit in silence, and those for a CPU that other experts are other ranks'.
"""

from vllm.model_executor.layers.fused_moe import MoERunner, UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from vllm_yocou.serving.batch_invariance import is_fixed

# vLLM's classes of experts that clamp, by their source.
CLAMPING = ("TritonExperts", "BatchedTritonExperts", "TritonWNA16Experts", "MarlinExperts")


def check_clamp(runner: MoERunner) -> None:
    """Have the experts honour their `swiglu_limit`; called before their weights are loaded.

    Not a subclass of vLLM's experts: quantization configs find them by the name of their class.

    Raises:
        ValueError: vLLM has chosen a kernel that ignores it.
    """
    method, limit = runner.routed_experts.quant_method, runner.moe_config.swiglu_limit
    unquantized = type(method) is UnquantizedFusedMoEMethod
    if unquantized and current_platform.is_cpu():
        from vllm_yocou.serving.looped_experts import loop_over_experts  # not before: what it extends is a CPU's

        loop_over_experts(runner)
        return
    experts = getattr(getattr(method, "experts_cls", None), "__name__", type(method).__name__)
    if experts not in CLAMPING:
        remedy = "use --moe-backend triton"
        if "LoRA" in experts:
            remedy = "leave out --enable-lora"
        elif not unquantized:
            remedy += " or a checkpoint whose experts are not quantized"
        raise ValueError(
            f"swiglu_limit {limit} cannot be used with vLLM's {experts}: they do not clamp what routed experts "
            f"compute, {remedy}."
        )


def choose_loop(runner: MoERunner) -> None:
    """On a CPU, loop over experts with expert parallelism, of which a rank computes its own, and with fixed shapes.

    Called as `check_clamp` is.

    Quantized experts do not come here: the engine settings refuse them.
    """
    if is_fixed() or (runner.moe_config.use_ep and current_platform.is_cpu()):
        from vllm_yocou.serving.looped_experts import loop_over_experts

        loop_over_experts(runner)
