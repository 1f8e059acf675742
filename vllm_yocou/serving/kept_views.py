"""vLLM's CPU attention over views of a cache that are made once, where vLLM makes them anew in every call.

A decode step writes T·S windows and reads them, and reads the global cache C times. Over contexts of a few hundred
tokens, the views take longer than the dispatch of the two operations that they are for.
"""

from typing import Any

import torch
from vllm import _custom_ops as ops

Views = tuple[torch.Tensor, torch.Tensor]


def keys_and_values(kv_cache: torch.Tensor) -> Views:
    """A CPU's cache (blocks, K, block size, 2 · d), of which a block has all keys of a head before the values.

    Returns two views (blocks, K, block size, d).
    """
    blocks, heads, block_size, _ = kv_cache.shape
    keys, values = kv_cache.view(blocks, heads, 2 * block_size, -1).chunk(2, dim=2)
    return keys, values


class KeptViews:
    """Mixed into vLLM's CPU implementation; a layer has `views`, those of its cache."""

    kv_cache_dtype: str
    scale: float
    sliding_window: int

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values (N, K, d) into the slots (N,)."""
        keys, values = layer.views
        ops.cpu_attn_reshape_and_cache(
            key,
            value,
            keys,
            values,
            slot_mapping,
            layer.isa,
            layer._k_scale_float,
            layer._v_scale_float,
            self.kv_cache_dtype,
        )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Attend with queries (N, H, d) over the cache, into `output` (N, H, d); rows of padding stay as they are."""
        if attn_metadata is None:  # vLLM warms up
            return output
        rows = attn_metadata.num_actual_tokens
        if rows < len(query):
            query, output = query[:rows], output[:rows]
        keys, values = layer.views
        ops.cpu_attention_with_kv_cache(
            query,
            keys,
            values,
            output,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            self.scale,
            attn_metadata.causal,
            None,  # slopes of ALiBi
            self.sliding_window,
            attn_metadata.block_table,
            0,  # no soft cap
            attn_metadata.scheduler_metadata,
            None,  # sinks
            None,  # causality by request
            layer._k_scale_float,
            layer._v_scale_float,
            self.kv_cache_dtype,
        )
        return output
