"""Rotary position embeddings of the reference model: rotating vectors by the frequencies of rope.py, in two layouts.

Half-split ("NeoX") pairs component i with i + d/2; interleaved, the layout of the 2024 YOCO code, pairs 2i with 2i + 1.
"""

from typing import NamedTuple

import torch

from vllm_yocou.config import YocoUConfig
from vllm_yocou.rope import inverse_frequencies


class Rotation(NamedTuple):
    """Angles of one call's tokens. cos and sin are (B or 1, 1, N, d/2), in float32 or wider."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool

    @classmethod
    def of(cls, config: YocoUConfig, head_dim: int, position_ids: torch.Tensor, dtype: torch.dtype) -> "Rotation":
        """The rotation of heads of size `head_dim` at position_ids (B or 1, N), with angles computed in `dtype`."""
        frequencies_r = inverse_frequencies(head_dim, config.rope_parameters, dtype, position_ids.device)
        angles_B1Nr = (position_ids[..., None].to(dtype) * frequencies_r)[:, None]
        return cls(angles_B1Nr.cos(), angles_B1Nr.sin(), config.rope_interleaved)


def rotate(x_BHNd: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotate the pairs of x (B, heads, N, d); the result has x's dtype."""
    if rotation.interleaved:
        first, second = x_BHNd[..., 0::2], x_BHNd[..., 1::2]
    else:
        first, second = x_BHNd.chunk(2, dim=-1)
    rotated = (first * rotation.cos - second * rotation.sin, second * rotation.cos + first * rotation.sin)
    joined = torch.stack(rotated, dim=-1).flatten(-2) if rotation.interleaved else torch.cat(rotated, dim=-1)
    return joined.to(x_BHNd.dtype)
