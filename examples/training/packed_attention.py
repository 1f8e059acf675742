"""Attention of packed documents without a mask: each sees itself alone, in pieces of a window where there is one.

    attn_implementation="packed"

The edges of the documents come as transformers hands them to every attention function, `cu_seq_lens_q`. A mask of N
tokens would take N * N numbers, and attention as much work in layers whose window is W: here they take N * 2 W.
Sequences are not padded, and there is no cache.
"""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv

NAME = "packed"


def packed(
    module: torch.nn.Module,
    q_BHNd: torch.Tensor,
    k_BKNd: torch.Tensor,
    v_BKNd: torch.Tensor,
    attention_mask: None,
    scaling: float,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The output (B, N, H, d) of causal attention; `cu_seq_lens_q` (documents + 1,) begins with 0 and ends with N."""
    groups = q_BHNd.shape[1] // k_BKNd.shape[1]
    k_BHNd, v_BHNd = repeat_kv(k_BKNd, groups), repeat_kv(v_BKNd, groups)
    edges = [0, q_BHNd.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    parts = [slice(begin, end) for begin, end in pairwise(edges)]
    documents = [
        document(q_BHNd[:, :, part], k_BHNd[:, :, part], v_BHNd[:, :, part], scaling, sliding_window) for part in parts
    ]
    return torch.cat(documents, dim=2).transpose(1, 2), None


def document(
    q_BHNd: torch.Tensor, k_BHNd: torch.Tensor, v_BHNd: torch.Tensor, scaling: float, window: int | None
) -> torch.Tensor:
    """The output (B, H, N, d) of one document, of whose keys a token sees the last `window`, its own included."""
    B, _, N, _ = q_BHNd.shape
    if window is None or window >= N:
        return scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, is_causal=True, scale=scaling)
    pieces = -(-N // window)

    def cut(x_BHNd: torch.Tensor, before: int) -> torch.Tensor:
        """Pieces of a window and of `before` tokens before it, as rows of a batch."""
        x_BHLd = pad(x_BHNd, (0, 0, before, pieces * window - N))
        return x_BHLd.unfold(2, before + window, window).permute(0, 2, 1, 4, 3).flatten(0, 1)

    # Of the keys from a window before its piece on, query i sees those behind i, up to its own at i + window. Of a
    # document's first piece, the keys before it are padding.
    query, key = torch.arange(window, device=q_BHNd.device)[:, None], torch.arange(2 * window, device=q_BHNd.device)
    seen_P1WK = ((query < key) & (key <= query + window)).repeat(pieces, 1, 1, 1)
    seen_P1WK[0] &= key >= window
    q, k, v = cut(q_BHNd, 0), cut(k_BHNd, window), cut(v_BHNd, window)
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen_P1WK.repeat(B, 1, 1, 1), scale=scaling)
    return out.unflatten(0, (B, pieces)).transpose(1, 2).flatten(2, 3)[:, :, :N]


AttentionInterface.register(NAME, packed)
