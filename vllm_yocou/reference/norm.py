"""The reference model's norms that torch's RMSNorm is not: of the residual stream, and the clip of queries and keys.

transformers initialises a class with RMSNorm in its name to ones.
"""

import torch
from torch import nn
from torch.nn import functional as F

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference.precision import at_least_float32


class StreamRMSNorm(nn.RMSNorm):
    """RMSNorm of the residual stream: computed in the stream's dtype, and rounded to the weight's, the model's."""

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        weight_D = self.weight.to(x_BND.dtype)
        return F.rms_norm(x_BND, self.normalized_shape, weight_D, self.eps).to(self.weight.dtype)


class ClippingRMSNorm(nn.Module):
    """x · min(1, limit / rms(x)) · weight: the weight scales every head, the limit shrinks those that exceed it."""

    def __init__(self, head_dim: int, eps: float, limit: float):
        super().__init__()
        self.eps = eps
        self.limit = limit
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, x_BHNd: torch.Tensor) -> torch.Tensor:
        wide_BHNd = x_BHNd.to(at_least_float32(x_BHNd))
        scale_BHN1 = self.limit * torch.rsqrt(wide_BHNd.square().mean(-1, keepdim=True) + self.eps)
        return (wide_BHNd * scale_BHN1.clamp(max=1) * self.weight).to(x_BHNd.dtype)


def head_norm(config: YocoUConfig, head_dim: int) -> nn.Module:
    """The norm of each head of queries or keys, where `qk_norm` places one."""
    if config.qk_clip_limit is not None:
        return ClippingRMSNorm(head_dim, config.rms_norm_eps, config.qk_clip_limit)
    return nn.RMSNorm(head_dim, config.rms_norm_eps)
