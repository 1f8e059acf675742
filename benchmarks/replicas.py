"""`examples/inference/ray_batch.py` with one and two replicas: tokens a second, and rows after a replica is killed."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from transformers import AutoTokenizer

from benchmarks.console import progress, publish
from benchmarks.results import ROOT, Result
from benchmarks.server import user_environment

EXAMPLE = ROOT / "examples" / "inference" / "ray_batch.py"
MODEL = ROOT / "examples" / "yoco-u-kjv"
VERSES = ROOT / "examples" / "evaluation" / "kjv_last_word.jsonl"
ENGINE = dict(dtype="float32", kv_cache_memory_bytes=128 << 20, max_model_len=512)
REPLICAS = (1, 2)
ROWS, TOKENS, BATCH, ROUNDS = 1024, 100, 32, 3
LIMIT_S = 900


def prompts() -> list[dict[str, str]]:
    verses = [json.loads(item)["context"].splitlines()[-1] for item in VERSES.read_text().splitlines()]
    return [{"id": f"row-{i}", "prompt": verses[i % len(verses)]} for i in range(ROWS)]


class Run:
    """One run over all rows, which ends when every row is answered."""

    def __init__(self, folder: Path, replicas: int) -> None:
        source, self.answers = folder / "rows.jsonl", folder / "answers"
        source.write_text("".join(json.dumps(row) + "\n" for row in prompts()))
        command = [sys.executable, str(EXAMPLE), str(MODEL), str(source), str(self.answers)]
        command += ["--replicas", str(replicas), "--cpus", str(1 / replicas), "--batch", str(BATCH)]
        command += ["--max-tokens", str(TOKENS), "--engine", json.dumps(ENGINE)]
        # Ray would give every replica one thread, and begin before the last one is ready.
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // replicas))}
        threads |= {"RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": str(LIMIT_S)}
        self.process = subprocess.Popen(command, env=user_environment() | threads, stdout=subprocess.DEVNULL)

    def parts(self) -> list[Path]:
        return sorted(self.answers.glob("*.jsonl"), key=lambda part: part.stat().st_mtime)

    def wait_for_a_part(self) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while not self.parts():
            assert self.process.poll() is None and time.monotonic() < deadline_s, "there was no answer"
            time.sleep(0.05)

    def kill_a_replica(self) -> None:
        found = psutil.Process(self.process.pid).children(recursive=True)
        next(child for child in found if "Replica" in child.name()).kill()

    def wait(self) -> None:
        assert self.process.wait(LIMIT_S) == 0

    def rows(self, parts: list[Path]) -> list[dict[str, str]]:
        return [json.loads(line) for part in parts for line in part.read_text().splitlines()]

    def tokens_s(self) -> float:
        """Of all parts but the first, since that one was written: without the start of the engines."""
        first, *others = self.parts()
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        tokens = sum(len(tokenizer.encode(row["completion"])) for row in self.rows(others))
        return tokens / (others[-1].stat().st_mtime - first.stat().st_mtime)

    def lost_and_doubled(self) -> tuple[int, int]:
        times = Counter(row["id"] for row in self.rows(self.parts()))
        return sum(row["id"] not in times for row in prompts()), sum(count > 1 for count in times.values())


def measure() -> Result:
    result = Result.here("replicas", model=MODEL.name, dtype="float32", rows=ROWS, tokens=TOKENS, rounds=ROUNDS)
    speeds: dict[int, list[float]] = {replicas: [] for replicas in REPLICAS}
    for number in range(ROUNDS):
        for replicas in REPLICAS:
            progress(f"{replicas} replicas, round {number + 1} of {ROUNDS}")
            with tempfile.TemporaryDirectory() as folder:
                run = Run(Path(folder), replicas)
                run.wait()
                speeds[replicas].append(run.tokens_s())
                assert run.lost_and_doubled() == (0, 0)
    for replicas, runs in speeds.items():
        result.add("answers", "1/s", runs, replicas=replicas)
    for replicas in REPLICAS:
        progress(f"{replicas} replicas, one of which is killed")
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder), replicas)
            run.wait_for_a_part()
            run.kill_a_replica()
            run.wait()
            lost, doubled = run.lost_and_doubled()
        result.add("rows lost", "rows", lost, replicas=replicas)
        result.add("rows doubled", "rows", doubled, replicas=replicas)
    return result


if __name__ == "__main__":
    publish(measure())
