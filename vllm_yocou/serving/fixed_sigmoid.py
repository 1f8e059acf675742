"""A sigmoid that gives a number the same bits wherever in a tensor it stands.

Of a tensor on a CPU, torch computes whole vectors by one approximation of exp, and what is left over by another, in its
sigmoid and its SiLU. What is left over depends on the number of rows and of threads. Its exp has one for both.
"""

import torch
from torch import nn


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Computed in float32, in the dtype of `x`."""
    return (1 / (1 + (-x.float()).exp())).to(x.dtype)


def silu(x: torch.Tensor) -> torch.Tensor:
    """Computed in float32, in the dtype of `x`."""
    return (x.float() / (1 + (-x.float()).exp())).to(x.dtype)


class FixedSiluAndMul(nn.Module):
    """SwiGLU's activation: gates and ups (N, 2 F) -> (N, F), both clamped where there is a limit."""

    def __init__(self, limit: float | None):
        super().__init__()
        self.limit = limit

    def forward(self, gate_up_NX: torch.Tensor) -> torch.Tensor:
        gate_NF, up_NF = gate_up_NX.chunk(2, dim=-1)
        if self.limit is not None:
            gate_NF, up_NF = gate_NF.clamp(max=self.limit), up_NF.clamp(-self.limit, self.limit)
        return silu(gate_NF) * up_NF
