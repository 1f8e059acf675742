"""The paper's claim in small: one shape trained at several T on the same tokens, and what each T costs to serve.

    python -m benchmarks t_sweep --corpus kjv --steps 300

Trains the model of examples/training/train.py (see there for the corpus) once for each T, then serves each checkpoint.
"""

from benchmarks.engine import SHARE, block_bytes, decoding, prompt_s, step_s

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm import LLM

from benchmarks.console import progress, publish
from benchmarks.kv_layout import held_in_decode
from benchmarks.precision import in_each_dtype
from benchmarks.results import Result

ITERATIONS = (1, 2, 3, 5)
PROMPT, BATCH, ROUNDS, STEPS = 1024, 8, 5, 20
TRAIN = Path(__file__).parent.parent / "examples" / "training" / "train.py"


def train(corpus: Path, output: Path, iterations: int, steps: int) -> dict:
    """training.json of a new checkpoint in `output`; a finished one there is kept."""
    report = output / "training.json"
    if not report.exists():
        command = [sys.executable, str(TRAIN), "--corpus", str(corpus), "--output", str(output)]
        command += ["--iterations", str(iterations), "--steps", str(steps)]
        subprocess.run(command, stdout=sys.stderr, check=True)
    return json.loads(report.read_text())


def serve(folders: dict[int, Path], dtype: str, result: Result) -> None:
    """Add what each T costs: seconds of a prompt and of a decode step, and the KV cache of a prompt's tokens."""
    settings: dict[str, Any] = dict(dtype=dtype, max_model_len=2048, max_num_seqs=BATCH, enforce_eager=True)
    settings |= dict(kv_cache_memory_bytes=128 << 20, enable_prefix_caching=False) | SHARE
    engines = {t: LLM(str(folder), **settings) for t, folder in folders.items()}
    prompts: dict[int, list[float]] = {t: [] for t in engines}
    steps: dict[int, list[float]] = {t: [] for t in engines}
    for _ in range(ROUNDS + 1):
        for t, llm in engines.items():
            prompts[t].append(prompt_s(llm, PROMPT))
    with ExitStack() as stack:
        for llm in engines.values():
            stack.enter_context(decoding(llm, BATCH, PROMPT, room=2 * ROUNDS * STEPS))
        for _ in range(ROUNDS):
            for t, llm in engines.items():
                steps[t] += [step_s(llm) for _ in range(STEPS)]
    for t, llm in engines.items():
        result.add("first token", "s", prompts[t][1:], T=t)  # the first round warms up
        result.add("decode step", "s", steps[t], T=t)
        result.add("KV cache", "MiB", held_in_decode(llm, PROMPT) * block_bytes(llm) / 2**20, T=t)


def measure(corpus: Path, steps: int, folder: Path, dtype: str = "float32") -> Result:
    """Checkpoints are trained in float32 and stay in `folder`; those found there are not trained again."""
    folders = {t: folder / f"T{t}-{steps}" for t in ITERATIONS}
    reports = {}
    for t in ITERATIONS:
        progress(f"training T = {t}")
        reports[t] = train(corpus, folders[t], t, steps)
    one = reports[ITERATIONS[0]]
    sizes = dict(parameters=one["parameters"], training_tokens=one["training_tokens"], steps=steps)
    result = Result.here("t_sweep", **sizes, dtype=dtype, prompt=PROMPT, batch=BATCH, rounds=ROUNDS)
    for t, report in reports.items():
        result.add("held-out perplexity", "", report["held_out_perplexity"][f"YOCO-U, T = {t}"], T=t)
    progress("serving")
    serve(folders, dtype, result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="as examples/training/train.py takes it")
    parser.add_argument("--steps", type=int, default=300, help="of 4096 tokens each")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints; those found there are not trained again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        publish(in_each_dtype(lambda dtype: measure(arguments.corpus, arguments.steps, folder, dtype)))


if __name__ == "__main__":
    main()
