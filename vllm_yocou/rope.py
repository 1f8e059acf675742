"""Rotary position embeddings of YOCO-U: four frequency tables, two layouts.

Half-split ("NeoX") pairs component i with i + d/2; interleaved, the layout of the 2024 YOCO code, pairs 2i with 2i + 1.
"""

import math

import torch


def inverse_frequencies(
    head_dim: int, rope_parameters: dict, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Angular frequencies (d/2,) in radians per position.

    "default": theta^(-2i/d) (arXiv 2104.09864, section 3.2). "yoco2024": theta^(-linspace(0, 1, d/2)), whose last
    frequency is 1/theta exactly, as in the code of arXiv 2405.05254. "linear" (arXiv 2306.15595): the default's over
    `factor`. "llama3" (Llama 3.1's code): only those that make fewer than `low_freq_factor` turns within
    `original_max_position_embeddings` positions, while those of more than `high_freq_factor` stay, and between the two
    a linear transition.
    """
    if rope_parameters["rope_type"] == "yoco2024":
        exponents = torch.linspace(0, 1, head_dim // 2, dtype=dtype, device=device)
    else:
        exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    frequencies = rope_parameters["rope_theta"] ** -exponents
    if rope_parameters["rope_type"] == "linear":
        return frequencies / rope_parameters["factor"]
    if rope_parameters["rope_type"] == "llama3":
        low, high = rope_parameters["low_freq_factor"], rope_parameters["high_freq_factor"]
        turns = frequencies * (rope_parameters["original_max_position_embeddings"] / (2 * math.pi))
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / rope_parameters["factor"])
    return frequencies


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the pairs of x (..., d) by angles whose cos and sin (..., d/2) broadcast against it; keeps x's dtype."""
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.to(x.dtype)
