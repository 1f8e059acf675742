"""What happens to single heads: a norm or a clip before attention, sigmoid gates after it.

Shapes: N rows, D hidden_size, d head size, H heads that the output projection reads, Q heads with a query, which are
2 · H in differential attention and H otherwise, G gates.
"""

from typing import cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from vllm_yocou.config import YocoUConfig
from vllm_yocou.serving.batch_invariance import is_fixed
from vllm_yocou.serving.fixed_sigmoid import sigmoid
from vllm_yocou.serving.norm import weight_dtype


class HeadNorm(RMSNorm):
    """RMSNorm of every head of a projection: (N, heads · d) -> (N, heads · d)."""

    def forward(self, x_NX: torch.Tensor) -> torch.Tensor:
        return super().forward(x_NX.unflatten(-1, (-1, self.hidden_size)).contiguous()).flatten(-2)


class HeadClip(nn.Module):
    """Shrinks heads whose root mean square exceeds a limit, and leaves others: (N, heads · d) -> (N, heads · d)."""

    def __init__(self, head_dim: int, limit: float, eps: float):
        super().__init__()
        self.limit, self.eps = limit, eps
        self.weight = nn.Parameter(torch.ones(head_dim), requires_grad=False)

    def forward(self, x_NX: torch.Tensor) -> torch.Tensor:
        x_NHd = x_NX.unflatten(-1, (-1, len(self.weight))).float()
        scale_NH1 = self.limit * torch.rsqrt(x_NHd.square().mean(-1, keepdim=True) + self.eps)
        # The weight multiplies heads that are not shrunk, too.
        return (x_NHd * scale_NH1.clamp(max=1) * self.weight.float()).to(x_NX.dtype).flatten(-2)


def head_norm(config: YocoUConfig, head_dim: int, wanted: bool) -> nn.Module:
    if not wanted:
        return nn.Identity()
    if config.qk_clip_limit is not None:
        return HeadClip(head_dim, config.qk_clip_limit, config.rms_norm_eps)
    return HeadNorm(head_dim, eps=config.rms_norm_eps, dtype=weight_dtype())


class GatedHeads(nn.Module):
    """What both decoders' attention does with the output of each head: gates, then the projection of all heads."""

    def __init__(self, vllm_config: VllmConfig, heads: int, head_dim: int, prefix: str):
        super().__init__()
        config = cast(YocoUConfig, vllm_config.model_config.hf_config)
        self.o_proj = RowParallelLinear(
            heads * head_dim,
            config.hidden_size,
            bias=config.attention_bias,  # which vLLM adds on one rank alone
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.head_dim = head_dim
        self.sigmoid = sigmoid if is_fixed() else torch.sigmoid
        self.both_gated = config.differential_attention == "v3"
        self.lambda_proj = self.gate_proj = None
        # Gates are never quantized. The heads of a pair lie next to each other, and every rank has whole pairs.
        if config.is_differential:
            self.lambda_proj = ColumnParallelLinear(
                config.hidden_size, heads * (2 if self.both_gated else 1), bias=False, prefix=f"{prefix}.lambda_proj"
            )
        elif config.headwise_glu:
            self.gate_proj = ColumnParallelLinear(config.hidden_size, heads, bias=False, prefix=f"{prefix}.gate_proj")

    def gates(self, h_ND: torch.Tensor) -> torch.Tensor | None:
        """(N, G) before the sigmoid, from what the queries are projected from; None if heads have no gates.

        Asked for before attention, where compiled code is cut in two: gates are fewer numbers to keep than rows.
        """
        projection = self.gate_proj if self.lambda_proj is None else self.lambda_proj
        return None if projection is None else projection(h_ND)[0]

    def output(self, out_NX: torch.Tensor, gates_NG: torch.Tensor | None) -> torch.Tensor:
        """The outputs of the query heads (N, Q · d) and their gates -> (N, D)."""
        if gates_NG is not None:
            out_NX = self.gated(out_NX, self.sigmoid(gates_NG.float()).unsqueeze(-1))
        out_ND, _ = self.o_proj(out_NX)
        return out_ND

    def gated(self, out_NX: torch.Tensor, gates_NG1: torch.Tensor) -> torch.Tensor:
        """(N, Q · d) -> (N, H · d), computed in float32."""
        out_NQd = out_NX.unflatten(-1, (-1, self.head_dim)).float()
        if self.both_gated:
            out_NQd = out_NQd * gates_NG1
            out_NHd = out_NQd[:, ::2] - out_NQd[:, 1::2]
        elif self.lambda_proj is not None:
            out_NHd = out_NQd[:, ::2] - out_NQd[:, 1::2] * gates_NG1
        else:
            out_NHd = out_NQd * gates_NG1
        return out_NHd.to(out_NX.dtype).flatten(-2)
