"""What the kernels take; anything else ends in an assertion that says what is wrong.

Shapes: N rows of a step, R requests of X blocks each, H query and K KV heads, d head size, B blocks of S slots.
"""

from dataclasses import dataclass

import torch

from vllm_yocou.kernels.vectors import HALVES, INTERLEAVED

ROWS = (torch.float32, torch.float16, torch.bfloat16)
CACHES = (*ROWS, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Rotation:
    """RoPE by a table.

    Attributes:
        cos_sin_PD: (P, d) contiguous, for each position d/2 cosines, then d/2 sines.
        interleaved: turn even against odd numbers instead of the first half against the second.
    """

    cos_sin_PD: torch.Tensor
    interleaved: bool = False

    @property
    def kind(self) -> int:
        return INTERLEAVED if self.interleaved else HALVES


@dataclass(frozen=True)
class Batch:
    """Which rows of a step belong to which request, as in vLLM's attention metadata; they are its last tokens.

    Attributes:
        block_table_RX: (R, X) int32, for each request the blocks of its positions, S to a block; rows contiguous.
        starts_R1: (R + 1,) int32, where each request's rows begin, and where those of the last end; rows after that
            are padding.
        lengths_R: (R,) int32, the tokens of each request up to the last of its rows.
    """

    block_table_RX: torch.Tensor
    starts_R1: torch.Tensor
    lengths_R: torch.Tensor

    def check(self) -> int:
        """Returns R."""
        assert self.block_table_RX.dim() == 2 and self.block_table_RX.stride(1) == 1, "block_table_RX is row by row"
        R = len(self.block_table_RX)
        assert self.starts_R1.shape == (R + 1,) and self.lengths_R.shape == (R,), f"starts and lengths of {R} requests"
        for numbers in (self.block_table_RX, self.starts_R1, self.lengths_R):
            assert numbers.dtype == torch.int32, "block table, starts and lengths are int32"
        return R


def check_rows(one: str, x_NKd: torch.Tensor, other: str, y_NKd: torch.Tensor) -> tuple[int, int, int]:
    """Two tensors of the same rows and heads; returns (N, K, d)."""
    assert x_NKd.dim() == 3 and x_NKd.shape == y_NKd.shape, f"{one} and {other} are both (rows, heads, head size)"
    assert x_NKd.dtype == y_NKd.dtype and x_NKd.dtype in ROWS, f"{one} and {other} are of one dtype of {ROWS}"
    assert x_NKd.stride(2) == y_NKd.stride(2) == 1, f"the numbers of a head lie side by side in {one} and {other}"
    N, K, d = x_NKd.shape
    return N, K, d


def check_queries(q_NHd: torch.Tensor, kv_heads: int) -> tuple[int, int, int]:
    """Queries that share `kv_heads` evenly; returns (N, H, d)."""
    assert q_NHd.dim() == 3 and q_NHd.dtype in ROWS, f"queries are (rows, heads, head size) of one of {ROWS}"
    assert q_NHd.stride(2) == 1, "the numbers of a head lie side by side in the queries"
    assert q_NHd.shape[1] % kv_heads == 0, f"{q_NHd.shape[1]} query heads are not shared by {kv_heads} KV heads evenly"
    N, H, d = q_NHd.shape
    return N, H, d


def check_cache(k_cache_BSKd: torch.Tensor, v_cache_BSKd: torch.Tensor, heads: int, d: int) -> int:
    """A paged cache for these heads; returns S."""
    assert k_cache_BSKd.dim() == 4 and k_cache_BSKd.shape == v_cache_BSKd.shape, "both caches are (B, S, K, d)"
    assert k_cache_BSKd.shape[2:] == (heads, d), f"the caches have {heads} heads of {d}, as the rows"
    assert k_cache_BSKd.dtype == v_cache_BSKd.dtype and k_cache_BSKd.dtype in CACHES, f"caches are of one of {CACHES}"
    assert k_cache_BSKd.stride(3) == v_cache_BSKd.stride(3) == 1, "the numbers of a head lie side by side in the caches"
    return k_cache_BSKd.shape[1]
