"""bfloat16, also with a float32 residual, beside float32 on this processor: prompts and decode steps, interleaved."""

from benchmarks.engine import config, decoding, prompt_s, start, step_s

from contextlib import ExitStack
from typing import Any

from benchmarks.console import progress, publish
from benchmarks.results import Result
from benchmarks.tables.speed import DTYPES, WIDE

SHAPE = "57M"
TOKENS = 2048
BATCHES = (1, 8)
CONTEXT = 600
ROUNDS, STEPS = 5, 16


def measure(**settings: Any) -> Result:
    """`settings` apply to every engine, in addition to the table's own."""
    result = Result.here("dtypes", shape=SHAPE, tokens=TOKENS, context=CONTEXT, rounds=ROUNDS, steps=ROUNDS * STEPS)
    common: dict[str, Any] = dict(max_model_len=2 * TOKENS, max_num_seqs=max(BATCHES), enforce_eager=True)
    common |= dict(kv_cache_memory_bytes=512 << 20)
    engines = {
        name: start(config(SHAPE, residual_in_fp32=name == WIDE), dtype=name.partition(",")[0], **common | settings)
        for name in DTYPES
    }
    for llm in engines.values():
        prompt_s(llm, TOKENS)
    prompts: dict[str, list[float]] = {dtype: [] for dtype in engines}
    for number in range(ROUNDS):
        progress(f"prompts, round {number + 1} of {ROUNDS}")
        for dtype, llm in engines.items():
            prompts[dtype].append(prompt_s(llm, TOKENS))
    for dtype, runs in prompts.items():
        result.add("first token", "s", runs, dtype=dtype)
    for batch in BATCHES:
        progress(f"decode, {batch} requests")
        steps: dict[str, list[float]] = {dtype: [] for dtype in engines}
        with ExitStack() as stack:
            for llm in engines.values():
                stack.enter_context(decoding(llm, batch, CONTEXT))
            for _ in range(ROUNDS):
                for dtype, llm in engines.items():
                    steps[dtype] += [step_s(llm) for _ in range(STEPS)]
        for dtype, runs in steps.items():
            result.add("decode step", "s", runs, dtype=dtype, batch=batch)
    return result


if __name__ == "__main__":
    publish(measure())
