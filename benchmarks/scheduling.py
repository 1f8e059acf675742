"""What a decode step costs outside the model: scheduling and input preparation, naive and packed KV groups."""

import os

# One thread, because only Python and tensors of a few hundred numbers are timed.
os.environ["OMP_NUM_THREADS"] = "1"
from benchmarks.engine import LAYOUTS, Stopwatch, config, core, decoding, runner, start

from contextlib import ExitStack
from typing import Any

from benchmarks.console import progress, publish
from benchmarks.results import Result

BATCHES = (1, 8, 16, 64)
SHAPE, WINDOW_CACHES = "24 layers", 36  # T·S
STEPS, ROUNDS = 30, 5


class Engine:
    """An engine in which the model's part of a step is timed separately."""

    def __init__(self, options: dict[str, Any]) -> None:
        # The model's width costs time that this table does not show.
        cfg = config(SHAPE, hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=32)
        settings: dict[str, Any] = dict(max_model_len=4096, max_num_seqs=max(BATCHES), max_num_batched_tokens=1024)
        self.llm = start(cfg, kv_cache_memory_bytes=2 << 30, additional_config={"yocou": options}, **settings)
        self.core, self.groups = core(self.llm), len(core(self.llm).scheduler.kv_cache_config.kv_cache_groups)
        self.inside, self.scheduling, self.preparing = Stopwatch(), Stopwatch(), Stopwatch()
        model, model_runner, scheduler = runner(self.llm).model, runner(self.llm), self.core.scheduler
        model.forward = self.inside.timed(model.forward)
        model.compute_logits = self.inside.timed(model.compute_logits)
        model_runner.execute_model = self.preparing.timed(model_runner.execute_model)
        scheduler.schedule = self.scheduling.timed(scheduler.schedule)

    def measure(self) -> tuple[float, float]:
        """Milliseconds a step: scheduling, and input preparation in the runner."""
        self.inside.s = self.scheduling.s = self.preparing.s = 0.0
        for _ in range(STEPS):
            self.llm.llm_engine.step()
        return self.scheduling.s / STEPS * 1e3, (self.preparing.s - self.inside.s) / STEPS * 1e3


def measure() -> Result:
    engines = {name: Engine(options) for name, options in LAYOUTS.items()}
    groups = {name: engine.groups for name, engine in engines.items()}
    result = Result.here(
        "scheduling", shape=SHAPE, window_caches=WINDOW_CACHES, groups=groups, steps=STEPS, rounds=ROUNDS
    )
    for batch in BATCHES:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        with ExitStack() as stack:
            for engine in engines.values():
                stack.enter_context(decoding(engine.llm, batch))
            for number in range(ROUNDS):
                progress(f"batch {batch}, round {number + 1} of {ROUNDS}")
                for name, engine in engines.items():
                    times[name].append(engine.measure())
        for name, runs in times.items():
            scheduling, preparation = zip(*runs, strict=True)
            result.add("scheduling", "ms", scheduling, batch=batch, layout=name)
            result.add("input preparation", "ms", preparation, batch=batch, layout=name)
    return result


if __name__ == "__main__":
    publish(measure())
