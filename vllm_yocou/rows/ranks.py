"""Data-parallel ranks that share experts call the cross-decoder together, each with rows of its own, or none calls it.

In every layer with experts such ranks exchange rows, and before a step vLLM tells each of them how many rows all have.
A rank whose prompt rows skip has fewer in the cross-decoder, and the others need to know. So every rank says how many
of its rows somebody reads, and whether that leaves any out: two integers for each rank, summed on the host over the
group in which vLLM agrees on the tokens of a step. The sum begins before the self-decoder and is waited for after it.

Which rows run stays a rank's own affair (selection.py). Steps that replay a full CUDA graph do without the sum: vLLM
replays one on all ranks or on none, and those hold decodes, which leave nothing out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import distributed
from vllm.config import CUDAGraphMode
from vllm.distributed import get_dp_group
from vllm.forward_context import DPMetadata, get_forward_context
from vllm.v1.worker.dp_utils import should_skip_dp_coordination

from vllm_yocou.rows.selection import share_experts, why_all_rows

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig


class RankShares:
    """How many rows each rank has in the cross-decoder of one step in which some rank leaves rows out.

    Attributes:
        rows_P: (ranks,) int32 on the host.
    """

    def __init__(self, rows_P: torch.Tensor, rank: int):
        self.rows_P = rows_P
        self.rank = rank

    @property
    def nobody_calls(self) -> bool:
        return not self.rows_P.any()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While the cross-decoder is called with this rank's rows, or with one that nobody reads where it has none."""
        context = get_forward_context()
        before = context.dp_metadata, context.attn_metadata
        context.dp_metadata = DPMetadata(self.rows_P.clamp(min=1))
        if not self.rows_P[self.rank]:
            # Attention then leaves the row alone, as in a batch that vLLM makes up.
            context.attn_metadata = None  # type: ignore[assignment]  # which vLLM declares for steps with requests
        try:
            yield
        finally:
            context.dp_metadata, context.attn_metadata = before


class Agreement:
    """One rank's part in the agreement on a step, from its question to the answer."""

    def __init__(self, parallel: "ParallelConfig", wanted: int, skips: bool):
        self.rank = parallel.data_parallel_rank
        self.said_2P = torch.zeros(2, parallel.data_parallel_size, dtype=torch.int32, device="cpu")
        self.said_2P[0, self.rank], self.said_2P[1, self.rank] = wanted, skips
        self.sum = distributed.all_reduce(self.said_2P, group=get_dp_group().cpu_group, async_op=True)

    def shares(self) -> RankShares | None:
        """None where no rank leaves a row out: the step goes on as vLLM has set it up."""
        self.sum.wait()
        rows_P, skips_P = self.said_2P
        return RankShares(rows_P, self.rank) if skips_P.any() else None


class Ranks:
    """The ranks that share experts with this one."""

    def __init__(self, parallel: "ParallelConfig"):
        self.parallel = parallel

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "Ranks | None":
        """None where no rank has to know of another's rows."""
        if not share_experts(vllm_config) or why_all_rows(vllm_config):
            return None
        return cls(vllm_config.parallel_config)

    def agree(self, wanted: int, skips: bool) -> Agreement | None:
        """Tell the other ranks of this rank's step, as all of them do in every step; None where all know it already.

        Args:
            wanted: rows of the step that somebody reads.
            skips: whether other rows of the step are left out.
        """
        if get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL or should_skip_dp_coordination():
            return None
        return Agreement(self.parallel, wanted, skips)
