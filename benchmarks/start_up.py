"""How long an engine takes until it is ready: eager, compiling, and with what an earlier start has compiled."""

import json
import os
import subprocess
import sys
import tempfile
import time

ITERATIONS = (1, 3, 6)
ROUNDS = 1
SHAPE = "77M"


def start_once(mode: int, checkpoint_iterations: int, iterations: int) -> None:
    """Print the seconds of `LLM(...)`, and of them those of vLLM's warm-up, in which it compiles."""
    from benchmarks.engine import config, start  # isort: skip
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    warm_up, warm_up_s = CPUModelRunner.warming_up_model, []

    def timed(self):
        start_s = time.perf_counter()
        warm_up(self)
        warm_up_s.append(time.perf_counter() - start_s)

    CPUModelRunner.warming_up_model = timed
    settings = dict(max_model_len=4096, max_num_seqs=8, kv_cache_memory_bytes=512 << 20)
    if iterations != checkpoint_iterations:
        settings["hf_overrides"] = {"num_iterations": iterations}
    cfg = config(SHAPE, num_iterations=checkpoint_iterations)
    start_s = time.perf_counter()
    # vLLM's compiled code belongs to the checkpoint's path.
    start(cfg, f"{os.environ['VLLM_CACHE_ROOT']}/checkpoint", compilation_config={"mode": mode}, **settings)
    print(json.dumps([time.perf_counter() - start_s, sum(warm_up_s)]), flush=True)


def seconds(cache: str, mode: int, checkpoint_iterations: int, iterations: int) -> list[float]:
    """`start_once` in a process of its own, with compiled code kept in the folder `cache`; first, all until ready."""
    kept = dict(VLLM_CACHE_ROOT=cache, TORCHINDUCTOR_CACHE_DIR=f"{cache}/inductor")
    arguments = [str(number) for number in (mode, checkpoint_iterations, iterations)]
    command = [sys.executable, "-m", "benchmarks.start_up", *arguments]
    start_s = time.perf_counter()
    with subprocess.Popen(command, env=os.environ | kept, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            ready_s, last = time.perf_counter() - start_s, line
    assert process.returncode == 0
    return [ready_s, *json.loads(last)]


def main() -> None:
    from benchmarks.engine import print_table

    starts: dict[tuple, list[list[float]]] = {}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            for t in ITERATIONS:
                cache = f"{folder}/{t}"
                seconds(cache, 0, t, t)  # vLLM keeps there what it finds out about a model, however it is run
                starts.setdefault(("eager", t), []).append(seconds(cache, 0, t, t))
                starts.setdefault(("compiles", t), []).append(seconds(cache, 3, t, t))
                starts.setdefault(("compiled before", t), []).append(seconds(cache, 3, t, t))
            first, *others = ITERATIONS
            for t in others:
                found = seconds(f"{folder}/{first}", 3, first, t)
                starts.setdefault((f"compiled before with T = {first}, overridden", t), []).append(found)
    best = {key: [min(times) for times in zip(*runs, strict=True)] for key, runs in starts.items()}
    rows = []
    for (way, t), (ready_s, start_s, warm_up_s) in best.items():
        eager_s, first_s = best["eager", t][0], best.get((way, ITERATIONS[0]), [0, 0, 0])[2]
        to_first = f"{warm_up_s / first_s:.2f}x" if first_s else ""
        times = [f"{ready_s:.1f} s", f"{ready_s / eager_s:.2f}x", f"{start_s:.1f} s", f"{warm_up_s:.1f} s"]
        rows.append([t, way, *times, to_first])
    header = ["T", "start", "ready", "this / eager", "`LLM(...)`", "warm-up", f"this / T = {ITERATIONS[0]}"]
    note = (
        f"{SHAPE} shape, float32. Ready: from the start of the process, with its imports; the quickest of {ROUNDS} in "
        "turn."
    )
    print_table("Start-up", note, header, rows)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        start_once(*map(int, sys.argv[1:]))
    else:
        main()
