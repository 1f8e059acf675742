"""Products in tiles are whole, and a tile of another size is used only where it gives the same bits."""

import pytest
import torch

from vllm_yocou.serving.fixed_tiles import SIZES, TILE, multiply_in_tiles, tile_sizes

WEIGHT_YX = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def exact(x_NX: torch.Tensor) -> torch.Tensor:
    """Element by element: no library that chooses an order by the number of rows."""
    return (x_NX[:, None] * WEIGHT_YX).sum(-1)


@pytest.mark.parametrize("sizes", [(TILE,), (32, 16, 4), (16, 8, 2, 1)])
def test_all_rows_are_multiplied_in_tiles_of_these_sizes(sizes):
    seen = []

    def multiply(x_NX):
        seen.append(len(x_NX))
        return exact(x_NX)

    for rows in (0, 1, 2, 15, 16, 17, 33, 100):
        x_NX = torch.randn(rows, 8)
        out_NY = torch.full((rows, 5), torch.nan)
        multiply_in_tiles(multiply, x_NX, sizes, out_NY)
        assert torch.equal(out_NY, exact(x_NX))
        assert set(seen) <= set(sizes) and rows <= sum(seen) < rows + sizes[-1]
        seen.clear()


def test_sizes_that_give_other_bits_are_left_out():
    def multiply(x_NX):
        return exact(x_NX) + 1e-6 * (len(x_NX) in (8, 128))

    assert tile_sizes(multiply, 100, 8, torch.float32) == tuple(sorted({*SIZES, TILE} - {8, 128}, reverse=True))
    # Too few outputs to see it in bfloat16.
    assert tile_sizes(multiply, 5, 8, torch.float32) == (TILE,)


def test_a_product_that_depends_on_a_rows_place_is_refused():
    def multiply(x_NX):
        return exact(x_NX) + 1e-6 * torch.arange(len(x_NX))[:, None]

    with pytest.raises(ValueError, match="products of 8 by 5 give a row other bits in another place of a tile"):
        tile_sizes(multiply, 5, 8, torch.float32)
