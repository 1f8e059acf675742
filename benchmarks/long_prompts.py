"""Prompts of up to a million tokens: the speed and the KV cache of YOCO-U, and of its peers as far as they come.

The peers are those of peers.py with the same sizes. They run in the first round only, and each of them up to the first
prompt that takes longer than LIMIT_S: that prompt is stopped, and longer ones are not tried.
"""

from benchmarks.engine import block_bytes, bounded_prompt_s, config, core, prompt_s, start, stop

import dataclasses
import math
from typing import Any

from vllm import LLM

from benchmarks.console import progress, publish
from benchmarks.kv_layout import held_in_decode
from benchmarks.peers import MARGIN, SMALL, described, our_pool, peers
from benchmarks.precision import in_each_dtype
from benchmarks.results import Result
from benchmarks.tables.comparisons import OURS, UNPACKED

# Prompts of a round by length. The longest of all runs once, alone, in an engine that has only room for it.
PROMPTS = {1 << 10: 5, 4 << 10: 2, 16 << 10: 1, 64 << 10: 1, 256 << 10: 1}
LONGEST = 1 << 20
ROUNDS, LIMIT_S = 3, 60


class Racers:
    """Engines of one type, and the lengths that each has still to try."""

    def __init__(self, dtype: str, prompts: dict[int, int]) -> None:
        sizes = dataclasses.replace(SMALL, dtype=dtype, prompts=prompts, batches=(1,), together=0)
        settings: dict[str, Any] = dict(dtype=dtype, max_num_seqs=1, enforce_eager=True)
        settings |= dict(max_model_len=max(prompts) + MARGIN // 2)  # pools end with whole blocks
        self.engines: dict[str, LLM] = {}
        for name, (cfg, more) in peers(sizes).items():
            if name != UNPACKED:  # it computes the same
                progress(f"starting {name}, {dtype}")
                self.engines[name] = start(cfg, **settings | more)
        self.seconds: dict[str, dict[int, list[float]]] = {
            name: {tokens: [] for tokens in prompts} for name in self.engines
        }
        self.prompts = prompts
        self.stopped: dict[str, int] = {}

    def round(self, names: list[str]) -> None:
        for tokens, runs in self.prompts.items():
            for name in names:
                for _ in range(runs if tokens < self.stopped.get(name, LONGEST) else 0):
                    seconds = bounded_prompt_s(self.engines[name], tokens, math.inf if name == OURS else LIMIT_S)
                    progress(f"{name}, {tokens} tokens: {'stopped' if seconds is None else f'{seconds:.1f} s'}")
                    if seconds is None:
                        self.stopped[name] = tokens
                        break
                    self.seconds[name][tokens].append(seconds)

    def held_mib(self, name: str, tokens: int) -> float:
        return held_in_decode(self.engines[name], tokens) * block_bytes(self.engines[name]) / 2**20

    def stop(self) -> None:
        while self.engines:
            stop(self.engines.popitem()[1])


def measure(dtype: str, prompts: dict[int, int] = PROMPTS, longest: int = LONGEST, rounds: int = ROUNDS) -> Result:
    sizes = {key: value for key, value in described(SMALL).items() if key in ("shape", "sizes", "mode")}
    sizes |= dict(dtype=dtype, prompts=prompts, rounds=rounds, limit_s=LIMIT_S)
    racers = Racers(dtype, prompts)
    chunks = {name: core(llm).scheduler.max_num_scheduled_tokens for name, llm in racers.engines.items()}
    result = Result.here("long_prompts", **sizes, chunks=chunks)
    for name in racers.engines:
        prompt_s(racers.engines[name], min(prompts))
    racers.round(list(racers.engines))
    for _ in range(rounds - 1):
        racers.round([OURS])
    for name, by_length in racers.seconds.items():
        for tokens, seconds in by_length.items():
            of: dict[str, Any] = dict(tokens=tokens, model=name)
            if seconds:
                result.add("first token", "s", seconds, **of)
            result.add("KV cache", "MiB", racers.held_mib(name, tokens), **of)
    racers.stop()
    add_longest(result, dtype, longest, min(prompts))
    return result


def add_longest(result: Result, dtype: str, tokens: int, first: int) -> None:
    """One prompt of YOCO-U alone, after a short one."""
    sizes = dataclasses.replace(SMALL, dtype=dtype, prompts={tokens: 1}, batches=(1,), together=0)
    cfg = config(sizes.shape, **sizes.changed, max_position_embeddings=tokens + MARGIN)
    settings: dict[str, Any] = dict(dtype=dtype, max_num_seqs=1, enforce_eager=True)
    settings |= dict(max_model_len=tokens + MARGIN // 2)
    llm = start(cfg, **settings | our_pool(sizes))
    prompt_s(llm, first)
    progress(f"{OURS}, {tokens} tokens, {dtype}")
    seconds = prompt_s(llm, tokens)
    of: dict[str, Any] = dict(tokens=tokens, model=OURS)
    result.add("first token", "s", seconds, **of)
    result.add("KV cache", "MiB", held_in_decode(llm, tokens) * block_bytes(llm) / 2**20, **of)
    stop(llm)


if __name__ == "__main__":
    publish(in_each_dtype(measure))
