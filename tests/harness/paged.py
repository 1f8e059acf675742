"""Paged caches for the kernels' tests: one layer's part of packed blocks, and the blocks of some requests, shuffled."""

import torch

from vllm_yocou.kernels.arguments import Batch, Rotation
from vllm_yocou.kernels.naive import rows

HALF_PRECISION = [torch.float16, torch.bfloat16]


def caches(blocks: int, slots: int, heads: int, d: int, dtype: torch.dtype, layers: int = 3) -> torch.Tensor:
    """(2, B, S, K, d), keys and values of the middle one of `layers` that share each block, filled at random."""
    packed_BLSKd = torch.randn(blocks, layers, 2, slots, heads, d).to(dtype)
    return packed_BLSKd[:, layers // 2].transpose(0, 1)


def batch(chunks: list[tuple[int, int]], blocks_each: int, slots: int) -> tuple[Batch, torch.Tensor]:
    """Requests with so many tokens before a step, and in it, over shuffled blocks; and the (N,) slots of their rows."""
    table_RX = torch.randperm(len(chunks) * blocks_each).view(len(chunks), blocks_each).int()
    starts_R1 = torch.tensor([0, *(fresh for _, fresh in chunks)]).cumsum(0).int()
    whole = Batch(table_RX, starts_R1, torch.tensor([before + fresh for before, fresh in chunks]).int())
    slots_N = [
        int(table_RX[request, position // slots]) * slots + position % slots for _, request, position in rows(whole)
    ]
    return whole, torch.tensor(slots_N)


def rotation(d: int, interleaved: bool, positions: int = 4096) -> Rotation:
    angles_Pd = torch.arange(positions).double()[:, None] * 10000.0 ** -(torch.arange(d // 2) / (d // 2)).double()
    return Rotation(torch.cat([angles_Pd.cos(), angles_Pd.sin()], 1).float(), interleaved)


def doubled(turned: Rotation) -> Rotation:
    return Rotation(turned.cos_sin_PD.double(), turned.interleaved)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Against float64: some roundings of float32, or two roundings of the dtype that was stored."""
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float8_e4m3fn: 0.13}[got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=tolerance)
