"""The reference model's attentions: a window in each layer of the self-decoder, and the global keys and values of all.

Shapes: B sequences, N tokens of this call, L keys (cached and of this call), D hidden_size, H heads that o_proj reads
and Q query heads, K key/value heads, all of size d. Q is 2H with differential attention, else H.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference.cache import YocoUCache
from vllm_yocou.reference.norm import StreamRMSNorm, head_norm
from vllm_yocou.reference.precision import at_least_float32
from vllm_yocou.reference.rope import Rotation, rotate


class Attention(nn.Module):
    """What both decoders' attentions share: queries, the call of the configured attention function, the output.

    Differential attention subtracts from each even query head's output the next one's: heads 2i and 2i + 1 make head i.
    """

    is_causal = True

    def __init__(self, config: YocoUConfig, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, rope: bool):
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        queries = 2 * heads if config.is_differential else heads
        self.num_key_value_groups = queries // kv_heads
        self.rope = rope
        self.q_proj = nn.Linear(config.hidden_size, queries * head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads * head_dim, config.hidden_size, bias=config.attention_bias)
        self.q_norm = head_norm(config, head_dim) if qk_norm else None
        self.lambda_proj = self.gate_proj = None
        if config.is_differential:
            gates = queries if config.differential_attention == "v3" else heads
            self.lambda_proj = nn.Linear(config.hidden_size, gates, bias=False)
        if config.headwise_glu:
            self.gate_proj = nn.Linear(config.hidden_size, heads, bias=False)

    def attend(
        self,
        h_BND: torch.Tensor,
        k_BKLd: torch.Tensor,
        v_BKLd: torch.Tensor,
        rotation: Rotation | None,
        mask: Any,
        sliding_window: int | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the output (B, N, D), and the weights (B, Q, N, L) if the attention function has them."""
        q_BQNd = heads_of(self.q_proj(h_BND), self.head_dim, self.q_norm, rotation if self.rope else None)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out_BNQd, weights_BQNL = attend(
            self, q_BQNd, k_BKLd, v_BKLd, mask, scaling=self.head_dim**-0.5, sliding_window=sliding_window, **kwargs
        )
        return self.o_proj(self.combined(out_BNQd, h_BND).flatten(-2)), weights_BQNL

    def combined(self, out_BNQd: torch.Tensor, h_BND: torch.Tensor) -> torch.Tensor:
        """The heads (B, N, H, d) that o_proj reads, from those of attention (B, N, Q, d) and the gates that h gives.

        Gates and differences are computed in float32 at least, and rounded once.
        """
        projection = self.lambda_proj or self.gate_proj
        if projection is None:
            return out_BNQd
        wide = at_least_float32(out_BNQd)
        heads, gates = out_BNQd.to(wide), projection(h_BND).to(wide).sigmoid()[..., None]
        if self.config.differential_attention == "v2":
            heads = heads[:, :, 0::2] - gates * heads[:, :, 1::2]
        else:
            heads = gates * heads
        if self.config.differential_attention == "v3":
            heads = heads[:, :, 0::2] - heads[:, :, 1::2]
        return heads.to(out_BNQd.dtype)


class WindowAttention(Attention):
    """Self-decoder attention: a token sees W keys, itself included, of its own iteration."""

    def __init__(self, config: YocoUConfig, layer: int):
        H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        super().__init__(config, H, K, d, qk_norm=config.qk_norm != "none", rope=True)
        self.layer = layer
        self.k_proj = nn.Linear(config.hidden_size, K * d, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, K * d, bias=config.attention_bias)
        self.k_norm = head_norm(config, d) if config.qk_norm != "none" else None

    def forward(
        self,
        h_BND: torch.Tensor,
        iteration: int,
        rotation: Rotation,
        mask: Any,
        cache: YocoUCache | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        k_BKLd = heads_of(self.k_proj(h_BND), self.head_dim, self.k_norm, rotation)
        v_BKLd = heads_of(self.v_proj(h_BND), self.head_dim)
        if cache is not None:
            slot = iteration * self.config.num_self_decoder_layers + self.layer
            k_BKLd, v_BKLd = cache.update(k_BKLd, v_BKLd, slot)
        return self.attend(h_BND, k_BKLd, v_BKLd, rotation, mask, self.config.sliding_window, **kwargs)


class CrossAttention(Attention):
    """Cross-decoder attention: its own queries over the global keys and values."""

    def __init__(self, config: YocoUConfig):
        H, K, d = config.cross_num_attention_heads, config.cross_num_key_value_heads, config.cross_head_dim
        super().__init__(config, H, K, d, qk_norm=config.qk_norm == "all", rope=config.cross_decoder_rope)

    def forward(
        self,
        h_BND: torch.Tensor,
        k_BKLd: torch.Tensor,
        v_BKLd: torch.Tensor,
        rotation: Rotation | None,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.attend(h_BND, k_BKLd, v_BKLd, rotation, mask, None, **kwargs)


class GlobalKV(nn.Module):
    """The one global KV: g = RMSNorm(x), K = Wk g, V = Wv g, once per token, for every cross layer."""

    def __init__(self, config: YocoUConfig):
        super().__init__()
        self.head_dim = config.cross_head_dim
        self.rope = config.cross_decoder_rope
        width = config.cross_num_key_value_heads * config.cross_head_dim
        self.norm = StreamRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_norm = head_norm(config, self.head_dim) if config.qk_norm == "all" else None

    def forward(self, x_BND: torch.Tensor, rotation: Rotation | None) -> tuple[torch.Tensor, torch.Tensor]:
        g_BND = self.norm(x_BND)
        k_BKNd = heads_of(self.k_proj(g_BND), self.head_dim, self.k_norm, rotation if self.rope else None)
        return k_BKNd, heads_of(self.v_proj(g_BND), self.head_dim)


def heads_of(
    x_BNX: torch.Tensor, head_dim: int, norm: nn.Module | None = None, rotation: Rotation | None = None
) -> torch.Tensor:
    """Split a projection (B, N, heads · d) into (B, heads, N, d); norm and rotate it where these are given."""
    x_BHNd = x_BNX.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    if norm is not None:
        x_BHNd = norm(x_BHNd)
    return x_BHNd if rotation is None else rotate(x_BHNd, rotation)


def eager_attention(
    module: Attention,
    q_BHNd: torch.Tensor,
    k_BKLd: torch.Tensor,
    v_BKLd: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention written out, for `attn_implementation="eager"`, with an additive mask (B, 1, N, L).

    Returns the output (B, N, H, d) and the weights (B, H, N, L).
    """
    k_BHLd = repeat_kv(k_BKLd, module.num_key_value_groups)
    v_BHLd = repeat_kv(v_BKLd, module.num_key_value_groups)
    scores_BHNL = q_BHNd @ k_BHLd.transpose(-1, -2) * scaling
    if mask is not None:
        scores_BHNL = scores_BHNL + mask
    weights_BHNL = scores_BHNL.to(at_least_float32(q_BHNd)).softmax(-1).to(q_BHNd.dtype)
    return (weights_BHNL @ v_BHLd).transpose(1, 2), weights_BHNL
