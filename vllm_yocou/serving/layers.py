"""The layers of both decoders: linear layers exist once, and only the window caches exist once for each iteration.

Shapes: N tokens of this step (all requests, one row a token), M of them in the cross-decoder, D hidden_size.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear
from vllm.utils.torch_utils import _encode_layer_name

from vllm_yocou.config import YocoUConfig
from vllm_yocou.serving.caches import GlobalCache, Loop, WindowCache, uses_kernels
from vllm_yocou.serving.feed_forward import feed_forward
from vllm_yocou.serving.heads import GatedHeads, head_norm
from vllm_yocou.serving.norm import norm
from vllm_yocou.serving.rope import rotary_embedding


class StreamNorm(RMSNorm):
    """RMSNorm of a residual stream in float32, whose result (N, D) has the model's dtype."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__(hidden_size, eps=eps, dtype=torch.float32)
        self.out_dtype = torch.get_default_dtype()

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return super().forward(x_ND).to(self.out_dtype)


def stream_norm(config: YocoUConfig) -> RMSNorm:
    """A norm of what the layers add to."""
    make = StreamNorm if config.residual_in_fp32 else norm
    return make(config.hidden_size, config.rms_norm_eps)


class LoopedWindowAttention(GatedHeads):
    """Self-decoder attention of one stored layer: one set of projections, one window cache for each iteration."""

    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str, cache_prefix: str):
        config = cast(YocoUConfig, vllm_config.model_config.hf_config)
        quant, d = vllm_config.quant_config, config.head_dim
        super().__init__(vllm_config, config.num_attention_heads, d, prefix)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            d,
            config.num_query_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant,
            prefix=f"{prefix}.qkv_proj",
        )
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.sizes = [heads * d, kv_heads * d, kv_heads * d]
        self.q_norm = head_norm(config, d, config.qk_norm in ("self", "all"))
        self.k_norm = head_norm(config, d, config.qk_norm in ("self", "all"))
        self.rotary_emb = rotary_embedding(vllm_config, d)
        step = None
        if uses_kernels(vllm_config):
            from vllm_yocou.serving.fused_attention import NormAndRotation, step_in_window

            step = partial(step_in_window, NormAndRotation(self.rotary_emb, self.q_norm, self.k_norm))
        # vLLM wants exactly one number in the name of a cached layer, different for each. Those that a compiled unit
        # names, iteration 0 and the global cache, have the same whatever T is.
        S, T = config.num_self_decoder_layers, config.num_iterations
        loop = Loop([f"{cache_prefix}.{1 + iteration * S + layer}" for iteration in range(T)], step)
        self.windows = nn.ModuleList(
            WindowCache(
                vllm_config,
                heads,
                d,
                kv_heads,
                window=config.sliding_window,
                quant_config=quant,
                loop=loop,
                prefix=name,
            )
            for name in loop.names
        )
        self.by_kernel = self.windows[0].by_kernel
        self.layer_name = _encode_layer_name(loop.names[0])
        self.query_shape, self.key_shape = (-1, heads, d), (-1, kv_heads, d)

    def forward(self, positions_N: torch.Tensor, h_ND: torch.Tensor, iteration: torch.Tensor) -> torch.Tensor:
        qkv_NX, _ = self.qkv_proj(h_ND)
        gates_NG = self.gates(h_ND)
        q_NX, k_NX, v_NX = qkv_NX.split(self.sizes, dim=-1)
        if not self.by_kernel:
            q_NX, k_NX = self.rotary_emb(positions_N, self.q_norm(q_NX), self.k_norm(k_NX))
        q_NHd, k_NKd, v_NKd = q_NX.view(self.query_shape), k_NX.view(self.key_shape), v_NX.view(self.key_shape)
        out_NHd = torch.empty_like(q_NHd, memory_format=torch.contiguous_format)
        torch.ops.vllm.yocou_attend_windows(q_NHd, k_NKd, v_NKd, out_NHd, iteration, self.layer_name)
        return self.output(out_NHd.flatten(1), gates_NG)


class GlobalKV(nn.Module):
    """The one writer of the global KV cache; nothing attends here."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, cache_prefix: str):
        super().__init__()
        config = cast(YocoUConfig, vllm_config.model_config.hf_config)
        dc = config.cross_head_dim
        ranks = get_tensor_model_parallel_world_size()
        self.norm = stream_norm(config)
        # No query heads: this layer then shards the KV heads, and replicates them where ranks outnumber them.
        self.kv_proj = QKVParallelLinear(
            config.hidden_size,
            dc,
            total_num_heads=0,
            total_num_kv_heads=config.cross_num_key_value_heads,
            bias=config.attention_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.kv_proj",
        )
        self.k_norm = head_norm(config, dc, config.qk_norm == "all")
        self.rotary_emb = rotary_embedding(vllm_config, dc) if config.cross_decoder_rope else None
        self.cache = GlobalCache(
            vllm_config,
            config.cross_num_query_heads // ranks,
            dc,
            self.kv_proj.num_kv_heads,
            quant_config=vllm_config.quant_config,
            prefix=f"{cache_prefix}.0",  # the first of all caches by name: connectors.py relies on it
        )
        self.write: Callable[..., torch.Tensor] | None = None
        if self.cache.by_kernel:
            from vllm_yocou.serving.fused_attention import NormAndRotation, write_global

            before = NormAndRotation(self.rotary_emb, nn.Identity(), self.k_norm)
            self.write = partial(write_global, before, self.cache.layer_name)

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor) -> torch.Tensor:
        """Project and store; returns the token that the readers take."""
        kv_NX, _ = self.kv_proj(self.norm(x_ND))
        k_NX, v_NX = kv_NX.chunk(2, dim=-1)
        if self.write is not None:
            return self.write(positions_N, k_NX, v_NX)
        k_NX = self.k_norm(k_NX)
        if self.rotary_emb is not None:
            # vLLM's rotary embedding rotates its first argument; here that is the keys.
            k_NX, _ = self.rotary_emb(positions_N, k_NX.contiguous(), None)
        return self.cache.write(k_NX, v_NX)


class CrossAttention(GatedHeads):
    """Cross-decoder attention: queries of its own over the global cache."""

    def __init__(self, vllm_config: VllmConfig, cache: GlobalCache, prefix: str):
        config = cast(YocoUConfig, vllm_config.model_config.hf_config)
        dc = config.cross_head_dim
        super().__init__(vllm_config, config.cross_num_attention_heads, dc, prefix)
        self.q_proj = ColumnParallelLinear(
            config.hidden_size,
            config.cross_num_query_heads * dc,
            bias=config.attention_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.q_proj",
        )
        self.q_norm = head_norm(config, dc, config.qk_norm == "all")
        self.rotary_emb = rotary_embedding(vllm_config, dc) if config.cross_decoder_rope else None
        self.read = cache.attend  # a bound method: the cache stays a submodule of its writer alone

    def forward(self, positions_M: torch.Tensor, h_MD: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        q_MX, _ = self.q_proj(h_MD)
        gates_MG = self.gates(h_MD)
        q_MX = self.q_norm(q_MX)
        if self.rotary_emb is not None:
            q_MX, _ = self.rotary_emb(positions_M, q_MX, None)
        return self.output(self.read(q_MX, written), gates_MG)


class DecoderLayer(nn.Module):
    """What a layer of either decoder has, named as in the checkpoint; the subclasses bring the attention.

    The stream `x_ND` is float32 where the config has `residual_in_fp32`, whatever is added to it.
    """

    def __init__(self, vllm_config: VllmConfig, stored_layer: int, prefix: str):
        super().__init__()
        config = cast(YocoUConfig, vllm_config.model_config.hf_config)
        self.input_layernorm = stream_norm(config)
        self.post_attention_layernorm = stream_norm(config)
        self.mlp = feed_forward(vllm_config, stored_layer, f"{prefix}.mlp")


class SelfDecoderLayer(DecoderLayer):
    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str, cache_prefix: str):
        super().__init__(vllm_config, layer, prefix)
        self.self_attn = LoopedWindowAttention(vllm_config, layer, f"{prefix}.self_attn", cache_prefix)

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor, iteration: torch.Tensor) -> torch.Tensor:
        x_ND = x_ND + self.self_attn(positions_N, self.input_layernorm(x_ND), iteration)
        return x_ND + self.mlp(self.post_attention_layernorm(x_ND))


class CrossDecoderLayer(DecoderLayer):
    def __init__(self, vllm_config: VllmConfig, layer: int, cache: GlobalCache, prefix: str):
        super().__init__(vllm_config, vllm_config.model_config.hf_config.num_self_decoder_layers + layer, prefix)
        self.cross_attn = CrossAttention(vllm_config, cache, f"{prefix}.cross_attn")

    def forward(self, positions_M: torch.Tensor, x_MD: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        x_MD = x_MD + self.cross_attn(positions_M, self.input_layernorm(x_MD), written)
        return x_MD + self.mlp(self.post_attention_layernorm(x_MD))
