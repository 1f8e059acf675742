"""Attention of fixed splits: each row attends as if it were the only one of its request in the step.

A CPU's kernel cuts keys into tiles by the queries that a request has in the step, and splits long contexts among
threads by what else there is. A single query over its own context always meets the same tiles in the same order.
"""

from typing import Any
from unittest.mock import patch

import torch
from vllm import envs
from vllm.v1.attention.backend import AttentionMetadata, CommonAttentionMetadata


def one_row_requests(batch: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """The same rows, each as a request of its own; what the batch has after the last row is padding, and goes."""
    starts_cpu = batch.query_start_loc_cpu
    rows = int(starts_cpu[-1])
    request_N = torch.repeat_interleave(torch.arange(len(starts_cpu) - 1), starts_cpu.diff())
    context_N = batch.seq_lens[request_N] - (starts_cpu[1:][request_N] - 1 - torch.arange(rows))
    each = torch.arange(rows + 1, dtype=starts_cpu.dtype)
    return batch.replace(
        query_start_loc=each,
        query_start_loc_cpu=each,
        seq_lens=context_N.to(batch.seq_lens.dtype),
        num_reqs=rows,
        max_query_len=min(rows, 1),
        block_table_tensor=batch.block_table_tensor[request_N],
        positions=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class RowByRow:
    """Mixed into the metadata builder of a CPU's attention."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AttentionMetadata:
        batch: Any = one_row_requests(common_attn_metadata)
        with patch.object(envs, "VLLM_CPU_ATTN_SPLIT_KV", False):
            return super().build(common_prefix_len, batch, fast_build)  # type: ignore[misc]  # a builder's
