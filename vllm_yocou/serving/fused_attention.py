"""Where the plugin's Triton kernels stand in for vLLM's: the window step, the global write, the cross attention.

Imported only with the option `kernels`, which is off: on an H100 decoding is slower with it (docs/cuda.md). A cache of
another dtype than the model's stays with vLLM's kernels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.attention import get_attention_context

from vllm_yocou.kernels.arguments import Batch, Rotation
from vllm_yocou.kernels.cross_attention import cross_attention, scratch
from vllm_yocou.kernels.global_write import global_write
from vllm_yocou.kernels.window_step import window_step
from vllm_yocou.rows.hand_over import RowOwner


def key_and_value(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, K, d) each of vLLM's (B, K, S, 2 · d), which all backends that this plugin builds on share."""
    key, value = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return key, value


def batch_of(metadata: Any) -> Batch:
    """Of a step's metadata, whose fields all backends that this plugin builds on share."""
    return Batch(metadata.block_table, metadata.query_start_loc, metadata.seq_lens)


@dataclass(frozen=True)
class NormAndRotation:
    """What happens to queries and keys before attention.

    Attributes:
        rotary_emb: vLLM's RoPE layer, or None for none.
        q_norm, k_norm: layers whose `weight` norms each head, or `nn.Identity`.
    """

    rotary_emb: nn.Module | None
    q_norm: nn.Module
    k_norm: nn.Module

    @property
    def rotation(self) -> Rotation | None:
        # Read in every step: vLLM moves the table to the queries' dtype in its first call.
        rotary_emb = self.rotary_emb
        return None if rotary_emb is None else Rotation(rotary_emb.cos_sin_cache, not rotary_emb.is_neox_style)

    @property
    def weights(self) -> tuple[torch.Tensor | None, torch.Tensor | None, float]:
        """Of the queries' norm and the keys', and their eps."""
        q_weight, k_weight = (getattr(norm, "weight", None) for norm in (self.q_norm, self.k_norm))
        return q_weight, k_weight, getattr(self.k_norm, "variance_epsilon", 0.0)


def step_in_window(
    before: NormAndRotation,
    name: str,
    q_NHd: torch.Tensor,
    k_NKd: torch.Tensor,
    v_NKd: torch.Tensor,
    out_NHd: torch.Tensor,
) -> None:
    """One launch for the norm, rotation, write and attention of the window cache called `name`, into `out_NHd`."""
    metadata, layer, kv_cache, slots_N = get_attention_context(name)
    if metadata is None:  # a profiling run, as vLLM's kernels take it
        out_NHd.zero_()
        return
    window_step(
        q_NHd,
        k_NKd,
        v_NKd,
        *key_and_value(kv_cache),
        slots_N,
        batch_of(metadata),
        metadata.max_query_len,
        layer.sliding_window,
        layer.impl.scale,
        before.rotation,
        *before.weights,
        out_NHd=out_NHd,
    )


def write_global(
    before: NormAndRotation, name: str, positions_N: torch.Tensor, k_NX: torch.Tensor, v_NX: torch.Tensor
) -> torch.Tensor:
    """One launch for the norm, rotation and write of keys and values (N, Kc · dc) into the global cache called `name`.

    Returns the empty tensor that later reads depend on, as vLLM's own op does.
    """
    _, layer, kv_cache, slots_N = get_attention_context(name)
    if slots_N is not None:
        _, norm_d, eps = before.weights
        rows = len(slots_N)  # vLLM pads the rest
        k_NKd, v_NKd = (x_NX[:rows].unflatten(-1, (-1, layer.head_size)) for x_NX in (k_NX, v_NX))
        global_write(k_NKd, v_NKd, *key_and_value(kv_cache), slots_N, norm_d, eps, before.rotation, positions_N[:rows])
    return k_NX.new_empty(0)


class CrossAttentionByKernel:
    """Mixed into an attention implementation of vLLM's: steps of at most one row a request are our kernel's.

    It reads a request's keys once for each of its rows: prompts whose every row runs are better off with vLLM's.
    """

    scale: float

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        self.most_requests = config.scheduler_config.max_num_seqs
        self.longest = config.model_config.max_model_len

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        **scales: Any,
    ) -> torch.Tensor:
        if attn_metadata is None:  # a profiling run: vLLM leaves the KV cache what memory this did not take
            scratch(self.most_requests, *query.shape[1:], self.longest, query.device)
        elif self.most_rows(layer, attn_metadata) <= 1 and kv_cache.dtype == query.dtype:
            rows = attn_metadata.num_actual_tokens
            keys_and_values = key_and_value(kv_cache)
            cross_attention(query[:rows], *keys_and_values, batch_of(attn_metadata), self.scale, out_MHd=output[:rows])
            return output
        vllms = super().forward  # type: ignore[misc]  # of the implementation that this is mixed into
        return vllms(layer, query, key, value, kv_cache, attn_metadata, output, **scales)

    @staticmethod
    def most_rows(layer: RowOwner, metadata: Any) -> int:
        """The largest number of rows in any one request; vLLM's metadata may say two where it is one."""
        step = layer.rows.of(metadata)
        return metadata.max_query_len if step is None else step.most
