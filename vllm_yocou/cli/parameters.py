"""Parameters and floating-point operations of a model, counted from its config."""

from math import prod

from vllm_yocou.checkpoints.format import expected_shapes
from vllm_yocou.config import YocoUConfig


def stored(config: YocoUConfig) -> int:
    """Parameters of the checkpoint; tied embeddings count once."""
    return sum(map(prod, expected_shapes(config).values()))


def _matrices(config: YocoUConfig, part: str) -> int:
    """Parameters of the matrices under `model.<part>.` that one token is multiplied with."""
    total = 0
    for name, shape in expected_shapes(config).items():
        if name.startswith(f"model.{part}.") and len(shape) == 2:
            share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
            total += prod(shape) * share
    return round(total)


def active(config: YocoUConfig) -> int:
    """Parameters of the matrices that one token is multiplied with, each once; embeddings only as the head."""
    parts = sum(_matrices(config, part) for part in ("self_decoder", "global_kv", "cross_decoder"))
    return parts + config.vocab_size * config.hidden_size


def flops(config: YocoUConfig, context: int) -> int:
    """Floating-point operations of one decoded token that sees `context` tokens, itself included.

    Two for each multiply-add: matrices, those of the self-decoder T times, and the two products of attention.
    """
    T, S = config.num_iterations, config.num_self_decoder_layers
    keys = min(context, config.sliding_window)
    windows = T * S * 2 * config.num_attention_heads * config.head_dim * keys
    width = config.cross_num_attention_heads * config.cross_head_dim
    cross = config.num_cross_decoder_layers * 2 * width * context
    looped = (T - 1) * _matrices(config, "self_decoder")
    return 2 * (active(config) + looped + windows + cross)


def row_flops(config: YocoUConfig, tokens: int) -> float:
    """Floating-point operations of a row of `tokens` that go forward together, each seeing those before it.

    `flops` is linear in the context on both sides of the window, so the ends of both parts give their sums.
    """
    total, first = 0.0, 1
    for last in (min(tokens, config.sliding_window), tokens):
        if first <= last:
            total += (last - first + 1) * (flops(config, first) + flops(config, last)) / 2
            first = last + 1
    return total
