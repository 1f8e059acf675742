"""How much of a machine's speed a step of distillation reaches: its floating-point operations, and the machine's."""

import math
import time

import torch
from distillation import iterating
from transformers import PreTrainedModel

from vllm_yocou.cli import sizing
from vllm_yocou.reference import YocoUForCausalLM


def step_flops(student: YocoUForCausalLM, teacher: PreTrainedModel, tokens: int, iterations: int) -> float:
    """Floating-point operations of a row of a step with so many `iterations`, without those of recomputed activations.

    A backward pass counts as two forward passes; the source goes forward once. The row is one document.
    """
    config = teacher.config
    matrices = teacher.num_parameters()
    if not config.tie_word_embeddings:
        matrices -= config.vocab_size * config.hidden_size  # the embeddings are looked up, not multiplied with
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    forward = 2 * matrices * tokens + 4 * width * tokens * (tokens + 1) / 2
    with iterating(student.config, iterations):
        return 3 * sizing.row_flops(student.config, tokens) + forward


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the quickest of ten products of two square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    quickest_s = math.inf
    for _ in range(11):  # the first one warms up
        started_s = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        quickest_s = min(quickest_s, time.perf_counter() - started_s)
    return 2 * size**3 / quickest_s
