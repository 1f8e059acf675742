"""Global K and V depend on the self-decoder alone, so rows that skip the cross-decoder feed nothing that anyone reads.

A row is one token of one request in one step. The self-decoder runs all rows and writes the global KV cache for all of
them; a row's way through the cross-decoder ends in its own logits and nowhere else. This file alone decides which rows
run: those whose logits someone reads, and always the last ones of a request's rows, so that a causal attention kernel
that aligns queries with the end of the context needs no change. What it reads and what becomes of its answer is in
hand_over.py.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from vllm_yocou.options import Options
from vllm_yocou.rows.hand_over import RequestTable

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass(frozen=True)
class SelectedRows:
    """The rows of a step that run through the cross-decoder.

    Attributes:
        rows_M: (M,) int64, indices into the step's N rows, ascending.
        query_start_loc: (requests + 1,) int32, where each request's rows begin among the M.
    """

    rows_M: np.ndarray
    query_start_loc: np.ndarray

    @cached_property
    def queries_R(self) -> np.ndarray:
        """(requests,) how many rows each request has among the M."""
        return np.diff(self.query_start_loc)


def select_rows(
    query_start_loc: np.ndarray,
    context_lengths: np.ndarray,
    is_prefilling: np.ndarray,
    wants_prompt: np.ndarray,
    prefill_lengths: np.ndarray,
) -> SelectedRows:
    """Rows from each request's last prefill token on, and all rows of those that want prompt log probabilities.

    Args:
        query_start_loc: (R + 1,) where each request's rows begin among the step's N.
        context_lengths: (R,) tokens of each request after this step.
        is_prefilling: (R,) bool, whether the step began inside the request's prompt.
        wants_prompt, prefill_lengths: (R,) from the request table.

    A chunk that does not reach the end of its prefill sends no row: the token sampled there is thrown away. Rows after
    the last prefill token are drafts, which vLLM may schedule in the step that ends a prefill.
    """
    scheduled = np.diff(query_start_loc)
    sampled = np.clip(context_lengths - prefill_lengths + 1, 0, scheduled)
    selected = np.where(is_prefilling & ~wants_prompt, sampled, scheduled)
    starts = np.zeros_like(query_start_loc)
    np.cumsum(selected, out=starts[1:])
    # The m-th selected row of a request that keeps k of its rows lies m - k before the request's end.
    rows_M = np.repeat(query_start_loc[1:] - starts[1:], selected) + np.arange(starts[-1])
    return SelectedRows(rows_M.astype(np.int64), starts.astype(np.int32))


class RowSelector:
    """Applies the selection to the batches of one engine."""

    def __init__(self, vllm_config: "VllmConfig", requests: RequestTable):
        from vllm.v1.attention.backend import max_decode_query_len

        self.requests = requests
        self.may_skip = why_all_rows(vllm_config) is None
        self.longest_decode = max_decode_query_len(vllm_config)

    def select(self, batch: "CommonAttentionMetadata") -> SelectedRows | None:
        """The rows of this step's batch to run, or None for all of them."""
        # Decodes alone: nothing to skip, and what CUDA graphs replay has to stay what they captured.
        if batch.max_query_len <= self.longest_decode or not (self.may_skip and self.requests.filled):
            return None
        assert batch.is_prefilling is not None and batch.seq_lens_cpu_upper_bound is not None  # both runners give them
        index = self.table_index(batch)
        real = len(index)  # requests after them are padding
        selected = select_rows(
            batch.query_start_loc_cpu[: real + 1].numpy(),
            # Exact for requests in prefill, and only theirs are compared.
            batch.seq_lens_cpu_upper_bound[:real].numpy(),
            batch.is_prefilling[:real].numpy(),
            self.requests.wants_prompt[index],
            self.requests.prefill_length[index],
        )
        return None if len(selected.rows_M) == batch.query_start_loc_cpu[-1] else selected

    def begins_a_request(self, batch: "CommonAttentionMetadata") -> bool:
        """Whether this step computes a prompt of somebody's: none that vLLM runs for itself does, before or after."""
        if batch.is_prefilling is None:
            return False
        index = self.table_index(batch)
        return bool((batch.is_prefilling[: len(index)].numpy() & ~self.requests.warms_up[index]).any())

    @staticmethod
    def is_made_up(batch: "CommonAttentionMetadata") -> bool:
        """Whether vLLM made the batch up, as an idle data-parallel rank's: real decodes have a context before them."""
        if batch.is_prefilling is None:  # half of a step that V1 has split
            return False
        assert batch.seq_lens_cpu_upper_bound is not None  # both runners give it
        rows = batch.query_start_loc_cpu.diff()
        has_context = bool((batch.seq_lens_cpu_upper_bound[: len(rows)] > rows).any())
        return not has_context and not bool(batch.is_prefilling.any())

    def table_index(self, batch: "CommonAttentionMetadata") -> np.ndarray:
        """Where the batch's requests stand in the table; what the batch has after them is padding."""
        # V2's batches name each request's index in its table, V1's batches are that table.
        return np.arange(len(batch.is_prefilling)) if batch.req_idx is None else batch.req_idx  # type: ignore[arg-type]


def share_experts(vllm_config: "VllmConfig") -> bool:
    """Whether data-parallel ranks exchange rows in layers with experts."""
    return vllm_config.model_config.is_moe and vllm_config.parallel_config.data_parallel_size > 1


def why_all_rows(vllm_config: "VllmConfig") -> str | None:
    """Why no row may skip the cross-decoder under these settings, or None if rows may."""
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled

    if not Options.of(vllm_config.additional_config).skip_rows:
        return "skip_rows is off"
    if vllm_config.model_config.runner_type == "pooling":
        return "pooling reads the hidden states of all rows"
    if share_experts(vllm_config) and vllm_config.lora_config is not None:
        return "adapters of ranks that share experts are mapped to all rows of a step"
    if vllm_config.parallel_config.use_ubatching:
        return "micro-batches have no request indices"
    if share_experts(vllm_config) and is_breakable_cudagraph_enabled():
        return "breakable CUDA graphs replay without asking other ranks that share experts"
    if vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner:
        return "vLLM's V1 runner does not say which requests want prompt logprobs under speculative decoding"
    return None
