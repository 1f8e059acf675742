"""Parameters and operations are those of the reference model, counted by torch."""

import pytest
import torch
from harness import tiny
from torch.utils.flop_counter import FlopCounterMode

from vllm_yocou.cli import parameters


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_parameters(name):
    model = tiny.model(tiny.CONFIGS[name])
    assert parameters.stored(model.config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", tiny.CONFIGS)
@torch.no_grad()
def test_matrix_operations_of_a_token(name):
    model = tiny.model(tiny.CONFIGS[name])
    counter = FlopCounterMode(display=False)
    with counter:
        model(torch.tensor([[5]]), use_cache=False)
    counted = counter.get_flop_counts()["Global"]
    matrices = sum(
        count for operation, count in counted.items() if "mm" in str(operation) and "bmm" not in str(operation)
    )
    assert parameters.flops(model.config, 0) == matrices


def test_attention_operations():
    cfg = tiny.config()  # T·S = 6 windows of 16, two cross layers; 4 heads of 32
    assert parameters.flops(cfg, 10) - parameters.flops(cfg, 0) == 4 * 4 * 32 * (6 * 10 + 2 * 10)
    assert parameters.flops(cfg, 100) - parameters.flops(cfg, 0) == 4 * 4 * 32 * (6 * 16 + 2 * 100)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
def test_operations_of_a_row(tokens):
    cfg = tiny.config()  # W 16
    assert parameters.row_flops(cfg, tokens) == sum(parameters.flops(cfg, n) for n in range(1, tokens + 1))
