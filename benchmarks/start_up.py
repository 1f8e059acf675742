"""How long `vllm serve` takes until it answers: eager, compiling, and with what an earlier start has compiled."""

from benchmarks.engine import config

import json
import os
import signal
import subprocess
import tempfile
import time

from benchmarks.console import progress, publish
from benchmarks.results import Result
from benchmarks.server import READY, VLLM, free_port, user_environment

ITERATIONS = (1, 3, 6)
ROUNDS = 2
SHAPE = "57M"
SETTINGS = "--load-format dummy --skip-tokenizer-init --dtype float32 --max-model-len 4096 --max-num-seqs 8"
SETTINGS += " --kv-cache-memory-bytes 512M --host 127.0.0.1"
LIMIT_S = 600


def seconds(cache: str, iterations: int, eager: bool = False) -> list[float]:
    """Seconds from the command to ready, and those of vLLM's warm-up, in which it compiles or loads what it compiled.

    The folder `cache` keeps a checkpoint and what was compiled for it: vLLM's compiled code belongs to its path.
    """
    command = ["timeout", str(LIMIT_S), VLLM, "serve", f"{cache}/checkpoint", *SETTINGS.split()]
    command += ["--port", str(free_port()), "--hf-overrides", json.dumps({"num_iterations": iterations})]
    command += ["--enforce-eager"] * eager
    kept = dict(VLLM_CACHE_ROOT=cache, TORCHINDUCTOR_CACHE_DIR=f"{cache}/inductor", VLLM_LOGGING_LEVEL="INFO")
    seen, start_s = {}, time.perf_counter()
    process = subprocess.Popen(
        command,
        env=user_environment() | kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        for words in ("Warming up model", "Warming up done", READY):
            if words in line:
                seen[words] = time.perf_counter() - start_s
        if READY in seen:
            break
    os.killpg(process.pid, signal.SIGTERM)
    process.stdout.read()
    process.wait()
    warm_up_s = seen.get("Warming up done", 0) - seen.get("Warming up model", 0)
    return [seen[READY], warm_up_s]


def measure() -> Result:
    result = Result.here("start_up", shape=SHAPE, dtype="float32", rounds=ROUNDS)
    starts: dict[tuple[int, str], list[list[float]]] = {}
    first, *others = ITERATIONS
    override = f"by override, after T = {first}"

    def timed(t: int, start: str, compiled_for: int) -> None:
        progress(f"T = {t}, {start}")
        found = seconds(f"{folder}/{compiled_for}", t, eager=start == "eager")
        starts.setdefault((t, start), []).append(found)

    with tempfile.TemporaryDirectory() as folder:
        for t in ITERATIONS:
            config(SHAPE, num_iterations=t).save_pretrained(f"{folder}/{t}/checkpoint")
            seconds(f"{folder}/{t}", t, eager=True)  # vLLM keeps what it finds out about a model, however it is run
            timed(t, "the first compiled one", t)
        for _ in range(ROUNDS):
            for t in ITERATIONS:
                timed(t, "eager", t)
                timed(t, "a second", t)
                if t in others:
                    timed(t, override, first)
    order = ("eager", "the first compiled one", "a second", override)
    for t, start in sorted(starts, key=lambda key: (key[0], order.index(key[1]))):
        ready, warm_up = zip(*starts[t, start], strict=True)
        result.add("ready", "s", ready, T=t, start=start)
        if start != "eager":
            result.add("warm-up", "s", warm_up, T=t, start=start)
    return result


if __name__ == "__main__":
    publish(measure())
