"""Products of fixed shapes: the bits of a row do not depend on the rows that are multiplied beside it.

A library adds up a product in an order that it chooses by the number of rows. Here rows are multiplied in tiles of a
few sizes that are known to give the same bits, whatever else is in a tile and wherever in it a row stands. Which sizes
do is found out for each shape when weights are loaded, on random rows.

Shapes: N rows, X inputs, Y outputs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

TILE = 16  # rows of the tile whose bits count
SIZES = (256, 128, 64, 32, 8, 4, 2, 1)  # of tiles that are used as well where they give the same bits

# By outputs, inputs, dtype and whether there is a bias. Libraries look at nothing else: each is tried once a process.
KNOWN: dict[tuple[int, int, torch.dtype, bool], tuple[int, ...]] = {}

# From rows (n, X) to (n, Y), in whatever order the library likes.
Multiply = Callable[[torch.Tensor], torch.Tensor]


def tile_sizes(multiply: Multiply, inputs: int, dtype: torch.dtype, what: str) -> tuple[int, ...]:
    """The sizes of tiles, largest first, that give every row the bits that it has in a tile of TILE rows.

    Raises:
        ValueError: these bits depend on the other rows of the tile, or on the row's place in it.
    """
    random = torch.Generator().manual_seed(0)
    x_NX = torch.randn(SIZES[0], inputs, generator=random).to(dtype)
    expected_NY = torch.cat([multiply(tile) for tile in x_NX.split(TILE)])
    for shift in range(1, TILE):
        shifted_NY = torch.cat([multiply(tile) for tile in x_NX.roll(shift, 0).split(TILE)])
        if not torch.equal(shifted_NY, expected_NY.roll(shift, 0)):
            raise ValueError(
                f"VLLM_BATCH_INVARIANT=1 cannot be used on this processor: the product of {what} gives a row other "
                "bits in another place of a tile, leave the variable out."
            )
    agreeing = {
        size for size in SIZES if torch.equal(torch.cat([multiply(tile) for tile in x_NX.split(size)]), expected_NY)
    }
    return tuple(sorted({*agreeing, TILE}, reverse=True))


def multiply_in_tiles(multiply: Multiply, x_NX: torch.Tensor, sizes: Sequence[int], out_NY: torch.Tensor) -> None:
    """Write the product of all rows into `out_NY`; the last tile is filled up with zeros where no size fits."""
    start, rows = 0, len(x_NX)
    for size in sizes:
        while rows - start >= size:
            out_NY[start : start + size] = multiply(x_NX[start : start + size])
            start += size
    if rest := rows - start:
        tile_nX = x_NX.new_zeros(sizes[-1], x_NX.shape[1])
        tile_nX[:rest] = x_NX[start:]
        out_NY[start:] = multiply(tile_nX)[:rest]


class FixedTiles:
    """Mixed into vLLM's methods of layers that are not quantized, on a CPU.

    Attributes:
        outputs, dtype: of a product, known once weights are loaded.
    """

    sizes: tuple[int, ...]
    outputs: int
    dtype: torch.dtype

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        weight: Any = layer.weight
        (self.outputs, inputs), self.dtype = weight.shape, weight.dtype
        super().process_weights_after_loading(layer)  # type: ignore[misc]  # of the method that this is mixed into
        bias = getattr(layer, "bias", None)
        shape = (self.outputs, inputs, self.dtype, bias is not None)
        if shape not in KNOWN:
            multiply = partial(super().apply, layer, bias=bias)  # type: ignore[misc]
            KNOWN[shape] = tile_sizes(multiply, inputs, self.dtype, self.name)
        self.sizes = KNOWN[shape]

    def multiply(self, layer: nn.Module, x_NX: torch.Tensor, bias_Y: torch.Tensor | None, out_NY: torch.Tensor) -> None:
        vllms = super().apply  # type: ignore[misc]  # of the method that this is mixed into
        multiply_in_tiles(lambda tile_nX: vllms(layer, tile_nX, bias_Y), x_NX.contiguous(), self.sizes, out_NY)


class TiledLinear(FixedTiles, UnquantizedLinearMethod):
    """Of linear layers, through an operator: compiled code cannot loop over tiles."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out_NY = x.new_empty(x.shape[0], self.outputs, dtype=self.dtype)
        torch.ops.vllm.yocou_tiled_linear(out_NY, x, bias, _encode_layer_name(self.name))
        return out_NY


class TiledHead(FixedTiles, UnquantizedEmbeddingMethod):
    """Of the head, which runs outside compiled code and outside vLLM's forward context."""

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out_NY = x.new_empty(len(x), self.outputs, dtype=self.dtype)
        self.multiply(layer, x, bias, out_NY)
        return out_NY


def tiled_linear(out_NY: torch.Tensor, x_NX: torch.Tensor, bias_Y: torch.Tensor | None, name: LayerNameType) -> None:
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(name)]
    layer.quant_method.multiply(layer, x_NX, bias_Y, out_NY)


def tiled_linear_fake(
    out_NY: torch.Tensor, x_NX: torch.Tensor, bias_Y: torch.Tensor | None, name: LayerNameType
) -> None:
    return None


direct_register_custom_op(
    op_name="yocou_tiled_linear", op_func=tiled_linear, mutates_args=["out_NY"], fake_impl=tiled_linear_fake
)


def fix_tiles(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Have all linear layers of a model multiply in tiles; called before its weights are loaded."""
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase):
            layer.quant_method = TiledLinear(name)
            vllm_config.compilation_config.static_forward_context[name] = layer
        elif isinstance(layer, ParallelLMHead):
            layer.quant_method = TiledHead(name)
