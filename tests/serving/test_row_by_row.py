"""Rows that attend as requests of their own have the context and the blocks that they have in their request."""

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_yocou.serving.row_by_row import one_row_requests


def test_each_row_becomes_a_request():
    """A chunk in the middle of a prompt, a decode, a request without rows, and padding."""
    start = torch.tensor([0, 3, 4, 4, 4], dtype=torch.int32)
    table = torch.arange(12, dtype=torch.int32).view(4, 3)
    batch = CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor([10, 7, 5, 0], dtype=torch.int32),
        num_reqs=4,
        num_actual_tokens=4,
        max_query_len=3,
        max_seq_len=10,
        block_table_tensor=table,
        slot_mapping=torch.arange(4),
    )
    rows = one_row_requests(batch)
    assert rows.num_reqs == 4 and rows.max_query_len == 1 and rows.num_actual_tokens == 4
    assert rows.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert rows.seq_lens.tolist() == [8, 9, 10, 7] and rows.seq_lens.dtype == torch.int32
    assert torch.equal(rows.block_table_tensor, table[[0, 0, 0, 1]])
