"""The paper's claim in small: one shape trained at several T on the same tokens, and what each T costs to serve.

    python -m benchmarks.t_sweep --corpus kjv --steps 300

Trains the model of examples/training/train.py (see there for the corpus) once for each T, then serves each checkpoint.
"""

from benchmarks.engine import SHARE, block_bytes, decoding, prompt_s, step_s

import argparse  # isort: skip
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from vllm import LLM

from benchmarks.kv_layout import held_in_decode
from benchmarks.table import print_table

ITERATIONS = (1, 2, 3, 5)
PROMPT, BATCH, ROUNDS, STEPS = 1024, 8, 5, 20
TRAIN = Path(__file__).parent.parent / "examples" / "training" / "train.py"
PICTURE = Path(__file__).parent / "pictures" / "t_sweep.png"


def train(corpus: Path, output: Path, iterations: int, steps: int) -> dict:
    """training.json of a new checkpoint in `output`; a finished one there is kept."""
    report = output / "training.json"
    if not report.exists():
        command = [sys.executable, str(TRAIN), "--corpus", str(corpus), "--output", str(output)]
        command += ["--iterations", str(iterations), "--steps", str(steps)]
        subprocess.run(command, stdout=sys.stderr, check=True)
    return json.loads(report.read_text())


def serve(folders: dict[int, Path]) -> dict[int, tuple[float, float, int]]:
    """By T: seconds of a prompt, seconds of a decode step, KV bytes of a request of PROMPT tokens."""
    settings = dict(dtype="float32", max_model_len=2048, max_num_seqs=BATCH, kv_cache_memory_bytes=128 << 20) | SHARE
    settings |= dict(enforce_eager=True, enable_prefix_caching=False)
    engines = {t: LLM(str(folder), **settings) for t, folder in folders.items()}
    prompts, steps = ({t: [] for t in engines} for _ in range(2))
    for _ in range(ROUNDS + 1):
        for t, llm in engines.items():
            prompts[t].append(prompt_s(llm, PROMPT))
    with ExitStack() as stack:
        for llm in engines.values():
            stack.enter_context(decoding(llm, BATCH, PROMPT, room=2 * ROUNDS * STEPS))
        for _ in range(ROUNDS):
            for t, llm in engines.items():
                steps[t] += [step_s(llm) for _ in range(STEPS)]
    return {
        t: (
            statistics.median(prompts[t][1:]),
            statistics.median(steps[t]),
            held_in_decode(llm, PROMPT) * block_bytes(llm),
        )
        for t, llm in engines.items()
    }


def table(perplexity: dict[int, float], costs: dict[int, tuple[float, float, int]]) -> list[list]:
    rows = []
    for t, (prompt, step, kv) in costs.items():
        base = costs[ITERATIONS[0]]
        cells = [f"{PROMPT / prompt:,.0f} ({base[0] / prompt:.2f}x)", f"{BATCH / step:,.0f} ({base[1] / step:.2f}x)"]
        rows.append([t, perplexity[t], *cells, f"{kv / 2**20:.2f} MiB ({kv / base[2]:.2f}x)"])
    return rows


def draw(perplexity: dict[int, float], costs: dict[int, tuple[float, float, int]], title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (quality, cost) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    quality.plot(list(perplexity), list(perplexity.values()), marker="o")
    quality.set(title="held-out perplexity", xlabel="T", xticks=list(perplexity))
    first = costs[ITERATIONS[0]]
    for part, label in enumerate(("prefill time", "decode time", "KV bytes")):
        cost.plot(list(costs), [costs[t][part] / first[part] for t in costs], marker="o", label=label)
    cost.set(title="cost, T = 1 is 1", xlabel="T", xticks=list(costs), ylim=(0, None))
    cost.legend()
    figure.suptitle(title, fontsize="small")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="as examples/training/train.py takes it")
    parser.add_argument("--steps", type=int, default=300, help="of 4096 tokens each")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints; those found there are not trained again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folders = {t: folder / f"T{t}-{arguments.steps}" for t in ITERATIONS}
        reports = {t: train(arguments.corpus, folders[t], t, arguments.steps) for t in ITERATIONS}
        costs = serve(folders)
    perplexity = {t: reports[t]["held_out_perplexity"][f"YOCO-U, T = {t}"] for t in ITERATIONS}
    one = reports[ITERATIONS[0]]
    note = (
        f"{one['parameters']:,} parameters, {one['training_tokens']:,} training tokens and one seed for each T; "
        f"float32, eager, prompts of {PROMPT} tokens, {BATCH} requests in decode; in brackets over T = 1."
    )
    header = ["T", "held-out perplexity", "prefill tokens/s", "decode tokens/s", "KV a request"]
    print_table("T", note, header, table(perplexity, costs))
    draw(perplexity, costs, f"{one['parameters']:,} parameters, {one['training_tokens']:,} training tokens")


if __name__ == "__main__":
    main()
