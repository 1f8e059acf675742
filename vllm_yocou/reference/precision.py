"""In which dtype the reference model computes what its own dtype is too narrow for: at least float32."""

import torch


def at_least_float32(x: torch.Tensor) -> torch.dtype:
    """x's own dtype, or float32 if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)
