"""Bytes are the paper's to the megabyte; parameters and operations are the reference model's, counted by torch."""

import pytest
import torch
from harness import tiny
from torch.utils.flop_counter import FlopCounterMode

from vllm_yocou.cli import sizing
from vllm_yocou.cli.sizing import KVBytes
from vllm_yocou.config import YocoUConfig

CONFIGS = tiny.CONFIGS | tiny.AUTHORS
# arXiv 2604.01220: tokens in K, MiB of a Transformer, of YOCO, of YOCO-U.
PUBLISHED = [(8, 320, 26, 46), (16, 640, 42, 62), (64, 2560, 138, 158), (256, 10240, 522, 542)]


def paper() -> YocoUConfig:
    return YocoUConfig(
        vocab_size=8192,
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=20,
        num_iterations=3,
        sliding_window=512,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=1 << 18,
    )


@pytest.mark.parametrize("thousands, transformer, yoco, yoco_u", PUBLISHED)
def test_published_figures(thousands, transformer, yoco, yoco_u):
    ways = (KVBytes.transformer(paper(), 2), KVBytes.yoco_u(paper(), 2, iterations=1), KVBytes.yoco_u(paper(), 2))
    assert [way.of_request(thousands << 10) / 2**20 for way in ways] == [transformer, yoco, yoco_u]


def test_counted_by_hand():
    cfg = tiny.config(cross_num_key_value_heads=1, cross_num_attention_heads=2, cross_head_dim=64)
    cost = KVBytes.yoco_u(cfg, 4)
    # T·S = 6 caches of 2 heads of 32; W = 16; K and V, 4 bytes.
    assert (cost.of_windows(5), cost.of_windows(16), cost.of_windows(17)) == (15360, 49152, 49152)
    assert cost.of_request(100) == 49152 + 100 * 512


def test_ranks_share_heads_or_copy_them():
    cfg = tiny.config(cross_num_key_value_heads=1)
    one, two = KVBytes.yoco_u(cfg, 2), KVBytes.yoco_u(cfg, 2, ranks=2)
    assert (two.window_token, two.token) == (one.window_token // 2, one.token)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 1000])
def test_what_fits_is_the_inverse(tokens):
    for cost in (KVBytes.yoco_u(tiny.config(), 2), KVBytes.transformer(tiny.config(), 2)):
        need = cost.of_request(tokens)
        assert (cost.tokens_in(need - 1), cost.tokens_in(need)) == (tokens - 1, tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name):
    model = tiny.model(CONFIGS[name])
    assert sizing.stored_parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_matrix_operations_of_a_token(name):
    model = tiny.model(CONFIGS[name])
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.tensor([[5]]), use_cache=False)
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(
        count for operation, count in counted.items() if "mm" in str(operation) and "bmm" not in str(operation)
    )
    assert sizing.flops(model.config, 0) == matrices


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_differential_attention_has_twice_the_attention_operations(kind):
    cfg = tiny.config(differential_attention=kind)
    attention = sizing.flops(tiny.config(), 100) - sizing.flops(tiny.config(), 0)
    assert sizing.flops(cfg, 100) - sizing.flops(cfg, 0) == 2 * attention


def test_attention_operations():
    cfg = tiny.config()  # T·S = 6 windows of 16, two cross layers; 4 heads of 32
    assert sizing.flops(cfg, 10) - sizing.flops(cfg, 0) == 4 * 4 * 32 * (6 * 10 + 2 * 10)
    assert sizing.flops(cfg, 100) - sizing.flops(cfg, 0) == 4 * 4 * 32 * (6 * 16 + 2 * 100)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
def test_operations_of_a_row(tokens):
    cfg = tiny.config()  # W 16
    assert sizing.row_flops(cfg, tokens) == sum(sizing.flops(cfg, n) for n in range(1, tokens + 1))
