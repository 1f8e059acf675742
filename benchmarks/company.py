"""How far a request's log probabilities move with what else the engine computes: other requests, chunks, hits."""

from benchmarks.engine import config, decoding, prompt_s, start, step_s, stop

import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from vllm import LLM, envs

from benchmarks.console import progress, publish
from benchmarks.prober import ANSWER, Prober
from benchmarks.results import Result
from benchmarks.trainer_kl import TRAINED, random_weights
from vllm_yocou.config import YocoUConfig

PROMPT, OTHERS, LONGEST = 1_100, 47, 60  # tokens, requests, tokens
CHUNKS = (100, 333)
DTYPES = ("float32", "bfloat16")
BATCHES, CONTEXT, ROUNDS, STEPS = (1, 8), 600, 5, 16
TRAINED_MODEL = "trained example"
MODES = ("vLLM's", "VLLM_BATCH_INVARIANT=1")

MIXTURE: dict[str, Any] = dict(
    num_self_decoder_layers=2,
    num_hidden_layers=4,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=256,
    shared_expert_intermediate_size=256,
)


@dataclass(frozen=True)
class Engine:
    """What is started: a model, and how."""

    model: str
    dtype: str
    compiled: bool = False
    changed: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def how(self) -> str:
        return f"T = {self.changed.get('num_iterations', 3)}, {'compiled' if self.compiled else 'eager'}"


def engines(dtypes: tuple[str, ...]) -> list[Engine]:
    """Every model in both types; the width that differs most also with T = 1, and compiled."""
    found = []
    for dtype in dtypes:
        found += [Engine(TRAINED_MODEL, dtype), Engine("57M", dtype), Engine("mixture", dtype, changed=MIXTURE)]
        found += [
            Engine("57M", dtype, changed=dict(num_iterations=1)),
            Engine("57M", dtype, compiled=True),
        ]
    return found


def start_engine(engine: Engine, **settings: Any) -> LLM:
    common: dict[str, Any] = dict(max_model_len=2 * PROMPT, max_num_batched_tokens=2 * PROMPT, max_num_seqs=OTHERS + 1)
    common |= dict(enforce_eager=not engine.compiled, kv_cache_memory_bytes=1 << 30, enable_prefix_caching=True)
    common |= dict(load_format="auto")
    folder = Path(tempfile.mkdtemp(prefix="yocou-bench-"))
    if engine.model == TRAINED_MODEL:
        cfg = YocoUConfig.from_pretrained(TRAINED, max_position_embeddings=4 * PROMPT)
        shutil.copy(TRAINED / "model.safetensors", folder)
    else:
        cfg = config("57M", **engine.changed)
        random_weights(cfg, torch.float32, folder)
    try:
        return start(cfg, str(folder), dtype=engine.dtype, **common | settings)
    finally:
        shutil.rmtree(folder)


def probe(engine: Engine, mode: str, **settings: Any) -> list[tuple[str, str, float]]:
    """What `Prober.differences` finds in an engine that is gone afterwards."""
    with patch.dict(os.environ, VLLM_BATCH_INVARIANT=str(int(mode == MODES[1]))):
        prober = Prober(start_engine(engine, **settings), PROMPT, OTHERS, LONGEST, CHUNKS)
        try:
            return list(prober.differences())
        finally:
            stop(prober.__dict__.pop("llm"))


def price(result: Result, dtype: str) -> None:
    """Prompts and decode steps of the 57M shape in both modes, interleaved."""
    engines = {}
    for mode in MODES:
        with patch.dict(os.environ, VLLM_BATCH_INVARIANT=str(int(mode == MODES[1]))):
            engines[mode] = start_engine(Engine("57M", dtype), enable_prefix_caching=False)
        envs.disable_envs_cache()  # which the engine that has started filled, and the next one would read
    prompts: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(1 + ROUNDS):
        for mode, llm in engines.items():
            seconds = prompt_s(llm, PROMPT)
            prompts[mode] += [seconds] if number else []  # the first one warms up
    for mode, runs in prompts.items():
        result.add("first token", "s", runs, mode=mode, dtype=dtype)
    for batch in BATCHES:
        steps: dict[str, list[float]] = {mode: [] for mode in MODES}
        with ExitStack() as stack:
            for llm in engines.values():
                stack.enter_context(decoding(llm, batch, CONTEXT, room=ROUNDS * STEPS + 100))
            for _ in range(ROUNDS):
                for mode, llm in engines.items():
                    steps[mode] += [step_s(llm) for _ in range(STEPS)]
        for mode, runs in steps.items():
            result.add("decode step", "s", runs, mode=mode, dtype=dtype, batch=batch)
    while engines:
        stop(engines.popitem()[1])


def measure(chosen: list[Engine] | None = None, dtypes: tuple[str, ...] = DTYPES, **settings: Any) -> Result:
    """`settings` apply to every engine whose numbers are compared, in addition to the table's own."""
    result = Result.here("company", prompt=PROMPT, others=OTHERS, longest_other=LONGEST, answer=ANSWER, context=CONTEXT)
    for dtype in dtypes:
        progress(f"price, {dtype}")
        price(result, dtype)
    for engine in chosen if chosen is not None else engines(dtypes):
        for mode in MODES:
            progress(f"{engine.model}, {engine.dtype}, {engine.how}: {mode}")
            for what, company, difference in probe(engine, mode, **settings):
                of = dict(model=engine.model, dtype=engine.dtype, how=engine.how, mode=mode, of=what, company=company)
                result.add("largest difference", "nats", difference, **of)
        result.save()  # the engines that are done, should a later one be cut
    return result


if __name__ == "__main__":
    publish(measure())
