"""What a decode step costs outside the model: scheduling and input preparation, naive and packed KV groups."""

import os

# One thread: what is timed is Python, and tensors of a few hundred numbers.
os.environ["OMP_NUM_THREADS"] = "1"
from benchmarks.engine import LAYOUTS, Stopwatch, config, core, decoding  # isort: skip  # noqa: E402
from benchmarks.engine import runner, start  # isort: skip  # noqa: E402
import statistics
from contextlib import ExitStack

from benchmarks.table import print_table

BATCHES = (1, 8, 16, 64)
STEPS, ROUNDS = 30, 5


class Engine:
    """An engine whose model's part of a step is timed apart."""

    def __init__(self, options: dict):
        # T·S = 36 window caches; the model's width costs time that this table does not show.
        cfg = config("24 layers", hidden_size=64, intermediate_size=64, num_attention_heads=4, head_dim=32)
        settings = dict(max_model_len=4096, max_num_seqs=max(BATCHES), max_num_batched_tokens=1024)
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


def main() -> None:
    engines = {name: Engine(options) for name, options in LAYOUTS.items()}
    rows = []
    for batch in BATCHES:
        times = {name: [] for name in engines}
        with ExitStack() as stack:
            for engine in engines.values():
                stack.enter_context(decoding(engine.llm, batch))
            for _ in range(ROUNDS):
                for name, engine in engines.items():
                    times[name].append(engine.measure())
        medians = {name: [statistics.median(part) for part in zip(*times[name], strict=True)] for name in engines}
        totals = {name: sum(parts) for name, parts in medians.items()}
        cells = [f"{totals[name]:.2f} ms ({s:.2f} + {p:.2f})" for name, (s, p) in medians.items()]
        rows.append([batch, *cells, f"{totals['naive'] / totals['packed']:.1f}x"])
    header = ["batch", *(f"{name}, {engine.groups} groups" for name, engine in engines.items()), "naive / packed"]
    note = (
        f"T·S = 36, a decode step without the model: scheduling + input preparation, median of {ROUNDS} rounds in turn."
    )
    print_table("Scheduling and input preparation", note, header, rows)


if __name__ == "__main__":
    main()
