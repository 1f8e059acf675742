"""Engines with random weights that run in this process, so that their parts can be timed and their pools read."""

import gc
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

# Before torch and vLLM are imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
os.environ["HF_HUB_OFFLINE"] = os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
from transformers import PretrainedConfig
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt

from vllm_yocou.config import YocoUConfig

# (S, C, T) and sizes. Every vocabulary is small; a table that does not depend on the width makes that small as well.
SHAPES: dict[str, dict[str, Any]] = {
    "paper 1.3B": dict(
        num_self_decoder_layers=10,
        num_hidden_layers=20,
        num_iterations=3,
        sliding_window=512,
        hidden_size=2560,
        intermediate_size=6912,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=128,
    ),
    "24 layers": dict(
        num_self_decoder_layers=12,
        num_hidden_layers=24,
        num_iterations=3,
        sliding_window=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
    ),
    "57M": dict(
        num_self_decoder_layers=8,
        num_hidden_layers=16,
        num_iterations=3,
        sliding_window=256,
        hidden_size=512,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    ),
    "yoco-u-kjv": dict(
        num_self_decoder_layers=3,
        num_hidden_layers=6,
        num_iterations=3,
        sliding_window=64,
        hidden_size=192,
        intermediate_size=512,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
    ),
}

# Engines that are compared share a GPU; the KV cache's share is set explicitly. A CPU has no such share.
SHARE: dict[str, Any] = dict(gpu_memory_utilization=0.15)

# Plugin options. A global block as small as a window block has room for one window cache.
LAYOUTS: dict[str, dict[str, Any]] = {"naive": {"max_global_block": 1}, "packed": {}}


def config(shape: str, **changed: Any) -> YocoUConfig:
    sizes: dict[str, Any] = dict(vocab_size=8192, max_position_embeddings=1 << 19, architectures=["YocoUForCausalLM"])
    return YocoUConfig(**sizes | SHAPES[shape] | changed)


def start(cfg: PretrainedConfig, folder: str | None = None, **settings: Any) -> LLM:
    folder = folder or tempfile.mkdtemp(prefix="yocou-bench-")
    cfg.save_pretrained(folder)
    defaults: dict[str, Any] = dict(skip_tokenizer_init=True, load_format="dummy", dtype="float32")
    defaults |= dict(enable_prefix_caching=False) | SHARE
    return LLM(folder, **defaults | settings)


def stop(llm: LLM) -> None:
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def core(llm: LLM) -> Any:
    """vLLM's EngineCore, which is in this process."""
    return getattr(llm.llm_engine.engine_core, "engine_core")  # noqa: B009  # only the client of this process has it


def prompt_s(llm: LLM, tokens: int) -> float:
    """Seconds to the first token of one request of `tokens` tokens."""
    seconds = bounded_prompt_s(llm, tokens, math.inf)
    assert seconds is not None
    return seconds


def bounded_prompt_s(llm: LLM, tokens: int, limit_s: float) -> float | None:
    """As `prompt_s`; None if it takes longer than `limit_s`, after which the request is gone."""
    parameters = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    engine = llm.llm_engine
    start_s = time.perf_counter()
    request = engine.add_request("0", TokensPrompt(prompt_token_ids=[5] * tokens), parameters)
    while engine.has_unfinished_requests():
        engine.step()
        if time.perf_counter() - start_s > limit_s:
            engine.abort_request([request], internal=True)
            engine.step()
            return None
    return time.perf_counter() - start_s


def steps_of_prompts(llm: LLM, batch: int, context: int) -> int:
    """Steps, at most, until `batch` prompts of `context` tokens are all computed, each in chunks."""
    chunk = core(llm).scheduler.max_num_scheduled_tokens
    return batch * (context // (chunk - batch) + 2)


@contextmanager
def decoding(llm: LLM, batch: int, context: int = 600, room: int = 3000) -> Iterator[None]:
    """`batch` requests of `context` tokens each, all of them in decode, with `room` for more steps.

    Their prompts are scheduled and not computed, since the time of a decode step does not depend on the numbers. The
    cache is written once: all memory that was never written is one page of zeros, which would stay in a core's cache.
    """
    model_runner = runner(llm)
    model, hidden_size = model_runner.model, llm.model_config.get_hidden_size()
    for cache in model_runner.kv_caches:
        cache.fill_(1)

    def instead(*, positions: torch.Tensor, **_: Any) -> torch.Tensor:
        """(N, D) instead of the model's, for positions (N,)."""
        return torch.zeros(len(positions), hidden_size, dtype=model_runner.dtype, device=positions.device)

    # The first one decodes while the others' prompts are still on their way.
    room += steps_of_prompts(llm, batch, context)
    parameters = SamplingParams(temperature=0, max_tokens=room, ignore_eos=True, detokenize=False)
    for i in range(batch):
        llm.llm_engine.add_request(str(i), TokensPrompt(prompt_token_ids=[1] * context), parameters)
    running = core(llm).scheduler.running
    with patch.object(model, "forward", instead):
        while len(running) < batch or not all(request.num_output_tokens for request in running):
            assert llm.llm_engine.has_unfinished_requests(), "there was no room for all of them at once"
            llm.llm_engine.step()
    for _ in range(3):
        llm.llm_engine.step()
    yield
    llm.llm_engine.abort_request([request.request_id for request in core(llm).scheduler.running], internal=True)
    llm.llm_engine.step()
    assert not core(llm).scheduler.running


def step_s(llm: LLM) -> float:
    """Seconds of one step. With async scheduling a step is waited for in the next one: take medians, not sums."""
    start_s = time.perf_counter()
    llm.llm_engine.step()
    return time.perf_counter() - start_s


def block_bytes(llm: LLM) -> int:
    """Bytes of a block of the KV cache pool, as vLLM allocated it."""
    kv_config = core(llm).scheduler.kv_cache_config
    (pool,) = {tensor.size for tensor in kv_config.kv_cache_tensors}  # every group has the same bytes
    return pool // kv_config.num_blocks


class Stopwatch:
    """Seconds spent in the functions that it wraps, by `clock_s`."""

    def __init__(self, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self.s, self.clock_s = 0.0, clock_s

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start_s = self.clock_s()
            result = function(*args, **kwargs)
            self.s += self.clock_s() - start_s
            return result

        return call


def runner(llm: LLM) -> Any:
    """vLLM's model runner, which is in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner
