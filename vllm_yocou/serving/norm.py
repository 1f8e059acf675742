"""vLLM's RMSNorm, rounded as the reference model rounds: once, after the weight.

On a CPU vLLM's norm is torch code, which rounds to the weight's dtype before it multiplies by it, so weights are held
in float32 there. Kernels of GPUs take weights of the model's dtype alone.
"""

import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform


def norm(size: int, eps: float) -> RMSNorm:
    """Of vectors of `size` numbers in the model's dtype."""
    return RMSNorm(size, eps=eps, dtype=weight_dtype())


def weight_dtype() -> torch.dtype | None:
    """None for the model's."""
    return torch.float32 if current_platform.is_cpu() else None
