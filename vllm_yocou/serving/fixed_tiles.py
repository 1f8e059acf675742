"""Products of fixed shapes: the bits of a row do not depend on the rows that are multiplied beside it.

A library adds up a product in an order that it chooses by the number of rows. Here rows are multiplied in tiles of a
few sizes that are known to give the same bits, whatever else is in a tile and wherever in it a row stands. Which sizes
do is found out for each shape when weights are loaded, on random numbers.

Shapes: N rows, X inputs, Y outputs.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

TILE = 16  # rows of the tile whose bits count
SIZES = (256, 128, 64, 32, 8, 4, 2, 1)  # of tiles that are used as well where they give the same bits
# Another order of a sum changes one number in some ten thousand that are rounded to bfloat16, so that many are needed
# to see it, and the products of few outputs are left in tiles of TILE.
NUMBERS, FEWEST_OUTPUTS = 1 << 18, 64

# From rows (n, X) to (n, Y), in whatever order the library likes.
Multiply = Callable[[torch.Tensor], torch.Tensor]


def tile_sizes(multiply: Multiply, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The sizes of tiles, largest first, that give every row the bits that it has in a tile of TILE rows.

    Raises:
        ValueError: these bits depend on the other rows of the tile, or on the row's place in it.
    """
    rows = SIZES[0] * math.ceil(NUMBERS / max(outputs, FEWEST_OUTPUTS) / SIZES[0])
    random = torch.Generator().manual_seed(0)
    x_NX = torch.randn(rows, inputs, generator=random).to(dtype)

    def product(size: int, x_NX: torch.Tensor = x_NX) -> torch.Tensor:
        return torch.cat([multiply(tile) for tile in x_NX.split(size)])

    expected_NY = product(TILE)
    for shift in range(1, TILE):
        if not torch.equal(product(TILE, x_NX.roll(shift, 0)), expected_NY.roll(shift, 0)):
            raise ValueError(
                f"VLLM_BATCH_INVARIANT=1 cannot be used on this processor: products of {inputs} by {outputs} give a "
                "row other bits in another place of a tile, leave the variable out."
            )
    tried = SIZES if outputs >= FEWEST_OUTPUTS else ()
    agreeing = {size for size in tried if torch.equal(product(size), expected_NY)}
    return tuple(sorted({*agreeing, TILE}, reverse=True))


def packed(weight_YX: torch.Tensor, bias_Y: torch.Tensor | None) -> Multiply:
    """As vLLM multiplies by the weight of a layer."""
    layer = nn.Module()
    layer.weight = nn.Parameter(weight_YX, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x_NX: layer.cpu_linear(x_NX, layer.weight, bias_Y)  # type: ignore[operator]  # vLLM's function


def unpacked(weight_YX: torch.Tensor, bias_Y: torch.Tensor | None) -> Multiply:
    return partial(F.linear, weight=weight_YX, bias=bias_Y)


@cache
def _known_sizes(
    make: Callable[..., Multiply], outputs: int, inputs: int, dtype: torch.dtype, has_bias: bool, threads: int
) -> tuple[int, ...]:
    random = torch.Generator().manual_seed(1)
    weight_YX = torch.randn(outputs, inputs, generator=random).to(dtype)
    bias_Y = torch.randn(outputs, generator=random).to(dtype) if has_bias else None
    return tile_sizes(make(weight_YX, bias_Y), outputs, inputs, dtype)


def known_sizes(
    make: Callable[..., Multiply], outputs: int, inputs: int, dtype: torch.dtype, has_bias: bool
) -> tuple[int, ...]:
    """Of the products that `make` makes; found out once a process, with random weights: a library sees shapes alone.

    Raises:
        ValueError: as `tile_sizes`.
    """
    return _known_sizes(make, outputs, inputs, dtype, has_bias, torch.get_num_threads())


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
        has_bias = getattr(layer, "bias", None) is not None
        self.sizes = known_sizes(packed, self.outputs, inputs, self.dtype, has_bias)
        super().process_weights_after_loading(layer)  # type: ignore[misc]  # of the method that this is mixed into

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
