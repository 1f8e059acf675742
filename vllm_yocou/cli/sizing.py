"""What a model costs, counted from its architecture: bytes of KV cache, parameters, floating-point operations.

KV-cache bytes are those of the paper's formula: what a request needs, without the rounding to blocks that any pool
adds. `Way` brings the blocks as well. Nothing here imports torch.
"""

from dataclasses import dataclass
from math import prod

from vllm_yocou.architecture import Architecture
from vllm_yocou.checkpoints.format import expected_shapes
from vllm_yocou.serving.packing import Packing


@dataclass(frozen=True)
class KVBytes:
    """Bytes of KV cache on one tensor-parallel rank.

    Attributes:
        token: of one token in all caches that keep every token.
        window_token: of one token in all caches that keep the last `window` tokens only.
        window: tokens that those keep.
    """

    token: int
    window_token: int = 0
    window: int = 0

    @classmethod
    def yoco_u(
        cls, config: Architecture, element_bytes: int, ranks: int = 1, iterations: int | None = None
    ) -> "KVBytes":
        """One global cache and T·S window caches (arXiv 2604.01220); with one iteration, plain YOCO.

        `element_bytes` of a stored key or value. Ranks share KV heads, or hold a copy where they are more.
        """
        packing = Packing.expected(config, element_bytes, ranks, block=1, iterations=iterations)
        return cls(packing.global_bytes, packing.window_caches * packing.window_bytes, config.sliding_window)

    @classmethod
    def transformer(cls, config: Architecture, element_bytes: int, ranks: int = 1) -> "KVBytes":
        """As many layers, each with a cache of its own of every token, in the self-decoder's heads."""
        heads = max(1, config.num_key_value_heads // ranks)
        return cls(token=2 * heads * config.head_dim * element_bytes * config.num_hidden_layers)

    def of_windows(self, tokens: int) -> int:
        return self.window_token * min(tokens, self.window)

    def of_request(self, tokens: int) -> int:
        """Bytes of a request of `tokens` in decode."""
        return self.token * tokens + self.of_windows(tokens)

    def tokens_in(self, budget: int) -> int:
        """The longest request that fits into `budget` bytes."""
        in_window = self.token + self.window_token
        if budget < in_window * self.window:
            return budget // in_window
        return (budget - self.of_windows(self.window)) // self.token


@dataclass(frozen=True)
class Way:
    """An architecture that `vllm-yocou kv` compares: the bytes of its caches, and how they share a pool of blocks."""

    name: str
    bytes: KVBytes
    packing: Packing


def ways(config: Architecture, element_bytes: int, ranks: int, block: int) -> list[Way]:
    """This model, plain YOCO and a Transformer; `block` is the smallest of the attention kernels, in tokens."""
    loops = {f"YOCO-U, T = {config.num_iterations}": config.num_iterations, "YOCO, T = 1": 1}
    transformer = KVBytes.transformer(config, element_bytes, ranks)
    return [
        *(
            Way(
                name,
                KVBytes.yoco_u(config, element_bytes, ranks, iterations),
                Packing.expected(config, element_bytes, ranks, block, iterations),
            )
            for name, iterations in loops.items()
        ),
        Way(
            f"Transformer, {config.num_hidden_layers} layers", transformer, Packing.unwindowed(block, transformer.token)
        ),
    ]


def stored_parameters(config: Architecture) -> int:
    """Parameters of the checkpoint; tied embeddings count once."""
    return sum(map(prod, expected_shapes(config).values()))


def _matrices(config: Architecture, part: str) -> int:
    """Parameters of the matrices under `model.<part>.` that one token is multiplied with."""
    total, chosen, experts = 0.0, config.num_experts_per_tok, config.num_experts
    of_experts = chosen / experts if chosen and experts else 1.0
    for name, shape in expected_shapes(config).items():
        if name.startswith(f"model.{part}.") and len(shape) == 2:
            total += prod(shape) * (of_experts if ".experts." in name else 1.0)
    return round(total)


def active_parameters(config: Architecture) -> int:
    """Parameters of the matrices that one token is multiplied with, each once; embeddings only as the head."""
    parts = sum(_matrices(config, part) for part in ("self_decoder", "global_kv", "cross_decoder"))
    return parts + config.vocab_size * config.hidden_size


def looped_parameters(config: Architecture) -> int:
    """The same, with those of the self-decoder counted T times."""
    return active_parameters(config) + (config.num_iterations - 1) * _matrices(config, "self_decoder")


def flops(config: Architecture, context: int) -> int:
    """Floating-point operations of one decoded token that sees `context` tokens, itself included.

    Two for each multiply-add: matrices, those of the self-decoder T times, and the two products of attention.
    """
    keys = min(context, config.sliding_window)
    width, cross_width = (
        config.num_query_heads * config.head_dim,
        config.cross_num_query_heads * config.cross_head_dim,
    )
    windows = config.num_iterations * config.num_self_decoder_layers * 2 * width * keys
    cross = config.num_cross_decoder_layers * 2 * cross_width * context
    return 2 * (looped_parameters(config) + windows + cross)


def row_flops(config: Architecture, tokens: int) -> float:
    """Floating-point operations of a row of `tokens` that go forward together, each seeing those before it.

    `flops` is linear in the context on both sides of the window, so the ends of both parts give their sums.
    """
    total, first = 0.0, 1
    for last in (min(tokens, config.sliding_window), tokens):
        if first <= last:
            total += (last - first + 1) * (flops(config, first) + flops(config, last)) / 2
            first = last + 1
    return total
