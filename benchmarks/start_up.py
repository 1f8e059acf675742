"""How long `vllm serve` takes until it answers: eager, compiling, and with what an earlier start has compiled."""

import json
import os
import signal
import subprocess
import tempfile
import time

from benchmarks.engine import config
from benchmarks.server import READY, VLLM, free_port, user_environment
from benchmarks.table import print_table

ITERATIONS = (1, 3, 6)
ROUNDS = 2
SHAPE = "57M"
SETTINGS = "--load-format dummy --skip-tokenizer-init --dtype float32 --max-model-len 4096 --max-num-seqs 8"
SETTINGS += " --kv-cache-memory-bytes 512M --host 127.0.0.1"
LIMIT_S = 600


def seconds(cache: str, iterations: int, eager: bool = False) -> list[float]:
    """From the command to ready, and of that vLLM's warm-up, in which it compiles or loads what it has compiled.

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


def main() -> None:
    starts: dict[tuple[str, int], list[list[float]]] = {}
    first, *others = ITERATIONS
    with tempfile.TemporaryDirectory() as folder:
        for t in ITERATIONS:
            config(SHAPE, num_iterations=t).save_pretrained(f"{folder}/{t}/checkpoint")
            seconds(f"{folder}/{t}", t, eager=True)  # vLLM keeps what it finds out about a model, however it is run
            starts["the first compiled one", t] = [seconds(f"{folder}/{t}", t)]
        for _ in range(ROUNDS):
            for t in ITERATIONS:
                starts.setdefault(("eager", t), []).append(seconds(f"{folder}/{t}", t, eager=True))
                starts.setdefault(("a second", t), []).append(seconds(f"{folder}/{t}", t))
                if t != first:
                    found = seconds(f"{folder}/{first}", t)
                    starts.setdefault((f"by override, after T = {first}", t), []).append(found)
    best = {key: [min(times) for times in zip(*runs, strict=True)] for key, runs in starts.items()}
    rows = []
    for (way, t), (ready_s, warm_up_s) in sorted(best.items(), key=lambda item: (item[0][1], item[0][0] != "eager")):
        cells = ["", ""]
        if way != "eager":
            to_first = best.get((way, first))
            cells = [f"{warm_up_s:.1f} s", f"{warm_up_s / to_first[1]:.2f}x" if to_first else ""]
        rows.append([t, way, f"{ready_s:.1f} s", f"{ready_s / best['eager', t][0]:.2f}x", *cells])
    note = f"{SHAPE} shape, float32, from the command `vllm serve` until it answers; the quickest of {ROUNDS} in turn."
    print_table("Start-up", note, ["T", "start", "ready", "this / eager", "warm-up", f"this / T = {first}"], rows)


if __name__ == "__main__":
    main()
