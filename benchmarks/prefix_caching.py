"""What `max_global_block` costs and saves: tokens that turns compute again, their first tokens, and decode steps."""

from benchmarks.engine import SHAPES, Stopwatch, block_bytes, config, core, decoding, runner, start, step_s, stop

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from vllm import LLM

from benchmarks.console import progress, publish
from benchmarks.conversations import CHATS, DOCUMENTS, Trace
from benchmarks.replay import Clock, Pace, pool_of, replay, without_model
from benchmarks.results import Key, Result
from benchmarks.tables.prefix_caching import AMPLE, DENSE, PAPER, TIMED
from vllm_yocou.cli.sizing import KVBytes
from vllm_yocou.config import YocoUConfig

LIMITS = (512, 256, 128, 64)
TRACES = {"chats": CHATS, "documents": DOCUMENTS}
SHARES = {"1.5x": 1.5, "1x": 1.0}  # of what the conversations hold when they end, by the formula
DTYPES = {TIMED: "float32", PAPER: "bfloat16"}
BYTES = {"float32": 4, "bfloat16": 2}
AMPLE_BYTES = 3 << 30
TIMED_BYTES = 5 << 28
SPOKEN = replace(CHATS, conversations=6)  # with a model
ROUNDS = 2
BATCH, CONTEXT, STEPS, STEP_ROUNDS = 64, 600, 4, 32


def engine(cfg: YocoUConfig, limit: int, **settings: Any) -> LLM:
    common: dict[str, Any] = dict(max_model_len=1 << 15, max_num_batched_tokens=1024, max_num_seqs=BATCH)
    common |= dict(enable_prefix_caching=True, async_scheduling=False)
    return start(cfg, additional_config={"yocou": {"max_global_block": limit}}, **common | settings)


def count(result: Result, shape: str, limit: int) -> None:
    """What needs no model: groups, and the tokens that are computed again in pools of several sizes."""
    # The model's width does not change its caches.
    cfg = config(shape, hidden_size=64, intermediate_size=64)
    llm = engine(cfg, limit, dtype=DTYPES[shape], kv_cache_memory_bytes=AMPLE_BYTES, enforce_eager=True)
    scheduler = core(llm).scheduler
    of: dict[str, Key] = dict(shape=shape, limit=limit)
    groups, everything = scheduler.kv_cache_config.kv_cache_groups, scheduler.kv_cache_config.num_blocks
    result.add("KV groups", "groups", len(groups), **of)
    result.add("step of hits", "tokens", max(group.kv_cache_spec.block_size for group in groups), **of)
    request = KVBytes.yoco_u(cfg, BYTES[DTYPES[shape]])
    for name, trace in TRACES.items():
        held = sum(request.of_request(conversation.tokens) for conversation in trace.draw())
        pools = {AMPLE: everything} | {pool: int(held * share / block_bytes(llm)) for pool, share in SHARES.items()}
        for pool, blocks in pools.items():
            replay_without_model(result, llm, trace, blocks, **of, trace=name, pool=pool)
    # vLLM's default keeps the windows where a prompt ends. Here they are kept wherever a hit can end.
    with patch.object(scheduler.kv_cache_manager.coordinator, "retention_interval", None):
        replay_without_model(result, llm, CHATS, everything, **of, trace="chats", pool=DENSE)
    stop(llm)


def replay_without_model(result: Result, llm: LLM, drawn_from: Trace, blocks: int, **of: Any) -> None:
    """Add what turns computed again, had to because only their windows were gone, and could have been spared."""
    conversations = drawn_from.draw()
    with pool_of(llm, blocks), without_model(llm):
        replayed = replay(llm, conversations, Pace())
    sizes = SHAPES[of["shape"]]
    reach = sizes["num_iterations"] * sizes["num_self_decoder_layers"] * (sizes["sliding_window"] - 1)
    result.add("turns", "requests", len(replayed.turns), **of)
    result.add("preemptions", "preemptions", replayed.preemptions, **of)
    result.add("computed again", "tokens", replayed.computed - drawn_from.needed(conversations), **of)
    result.add("without windows", "tokens", sum(turn.globally - turn.cached for turn in replayed.turns), **of)
    spared = sum(max(0, turn.globally - turn.cached - reach) for turn in replayed.turns)
    result.add("spared by windows computed again", "tokens", spared, **of)


class Step:
    """Decode steps of one engine; the model's part is timed separately, in processor time of the engine's thread."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.inside = llm, Stopwatch(time.thread_time)
        model = runner(llm).model
        model.forward = self.inside.timed(model.forward)
        model.compute_logits = self.inside.timed(model.compute_logits)

    def measure(self) -> tuple[float, float]:
        """Milliseconds of a step, and of the processor outside the model."""
        start_s, self.inside.s = time.thread_time(), 0.0
        whole_s = step_s(self.llm)
        return whole_s * 1e3, (time.thread_time() - start_s - self.inside.s) * 1e3


def first_tokens(result: Result, engines: dict[int, LLM]) -> None:
    conversations = SPOKEN.draw()
    seconds: dict[int, list[float]] = {limit: [] for limit in engines}
    for number in range(ROUNDS):
        for limit, llm in engines.items():
            progress(f"conversations, {limit}, round {number + 1} of {ROUNDS}")
            assert core(llm).scheduler.kv_cache_manager.reset_prefix_cache()
            seconds[limit] += [turn.first_s - turn.arrived_s for turn in replay(llm, conversations, Clock()).turns]
    for limit, runs in seconds.items():
        result.add("time to first token", "s", runs, shape=TIMED, limit=limit)


def steps(result: Result, engines: dict[int, LLM]) -> None:
    times: dict[int, list[tuple[float, float]]] = {limit: [] for limit in engines}
    with ExitStack() as stack:
        for llm in engines.values():
            # A prefix that all requests share would be read from a core's cache.
            manager = core(llm).scheduler.kv_cache_manager
            stack.enter_context(patch.object(manager, "prefix_cache_lookup_enabled", lambda request: False))
            stack.enter_context(decoding(llm, BATCH, CONTEXT))
        watched = {limit: Step(llm) for limit, llm in engines.items()}
        for number in range(STEP_ROUNDS):
            progress(f"decode steps, round {number + 1} of {STEP_ROUNDS}")
            for limit, step in watched.items():
                times[limit] += [step.measure() for _ in range(STEPS)]
    for limit, runs in times.items():
        whole, outside = zip(*runs, strict=True)
        result.add("decode step", "ms", whole, shape=TIMED, limit=limit)
        result.add("outside the model", "ms", outside, shape=TIMED, limit=limit)


def measure() -> Result:
    result = Result.here(
        "prefix_caching",
        windows={shape: SHAPES[shape]["sliding_window"] for shape in DTYPES},
        conversations=SPOKEN.conversations,
        rounds=ROUNDS,
        batch=BATCH,
        context=CONTEXT,
        steps=STEPS * STEP_ROUNDS,
    )
    for shape in DTYPES:
        for limit in LIMITS:
            progress(f"tokens that are computed again, {shape}, {limit}")
            count(result, shape, limit)
    progress("engines with a model")
    engines = {limit: engine(config(TIMED), limit, kv_cache_memory_bytes=TIMED_BYTES) for limit in LIMITS}
    first_tokens(result, engines)
    steps(result, engines)
    return result


if __name__ == "__main__":
    publish(measure())
