"""What a YOCO-U model made of a Llama is worth: after initialisation and after healing, beside its source, for each T.

    python -m benchmarks.healing LLAMA prose.txt --steps 16 --keep healed

Runs `vllm-yocou upcycle` and examples/training/distill.py as a user does, then lm-eval and decode steps in vLLM. With
--keep the healed checkpoints stay, those found there are not made again, and a stopped run goes on. Options that are not
of this table are distill.py's: --precision bfloat16 --batch 8 --accumulate 1 on a GPU.
"""

from benchmarks.engine import SHARE, block_bytes, decoding, step_s

import argparse  # isort: skip
import json
import math
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig
from vllm import LLM

from benchmarks.evaluation import COMMON, ROOT, RULER, RULER_TOKENS, evaluate
from benchmarks.kv_layout import held_in_decode
from benchmarks.server import user_environment
from benchmarks.table import print_table

UPCYCLE = str(Path(sys.executable).with_name("vllm-yocou"))
ITERATIONS = (1, 2, 3)
WINDOW, ROW, STEP_ROWS = 512, 512, 8  # tokens of a window and of a training row, rows of a step
TASKS = (*COMMON, RULER[0])
KV_TOKENS, CONTEXT = 8192, 8000  # of the request whose KV cache is counted, and of the one that decodes
STEPS, ROUNDS = 10, 5


@dataclass(frozen=True)
class Made:
    """A model as `upcycle` left it, as healing left it, and what distill.py reports of both."""

    start: Path
    healed: Path
    report: dict


def make(source: Path, text: Path, folder: Path, iterations: int, steps: int, more: list[str]) -> Made:
    """`more` arguments go to distill.py. A run that was stopped goes on from what it saved."""
    start, healed = folder / f"T{iterations}", folder / f"T{iterations}-{steps}"
    if not start.exists():
        layers = AutoConfig.from_pretrained(source).num_hidden_layers
        command = [UPCYCLE, "upcycle", str(source), str(start), "--self-layers", str(layers // 2)]
        command += ["--iterations", str(iterations), "--window", str(WINDOW)]
        subprocess.run(command, stdout=sys.stderr, check=True)
    report = healed / "distillation.json"
    if not report.exists():
        command = [sys.executable, str(ROOT / "examples" / "distill.py"), str(source), str(start), str(healed)]
        command += ["--text", str(text), "--steps", str(steps), "--every", str(math.ceil(steps / 20))]
        command += ["--sequence", str(ROW), "--accumulate", str(STEP_ROWS), *more]
        if any((healed / "steps").glob("checkpoint-*")):
            command.append("--resume")
        subprocess.run(command, env=user_environment(), stdout=sys.stderr, check=True)
    return Made(start, healed, json.loads(report.read_text()))


def scores(model: Path, limit: int) -> list[float]:
    """The first metric of each task: accuracies, and the share of needles found."""
    found = evaluate(model, "vllm", TASKS, limit).metrics
    return [next(iter(found[task].values())) for task in TASKS]


def serve(models: list[Path]) -> list[tuple[int, float]]:
    """KV bytes of a request of KV_TOKENS, and median seconds of a decode step of one of CONTEXT, model by model."""
    settings = dict(dtype="float32", max_model_len=KV_TOKENS, max_num_seqs=1, kv_cache_memory_bytes=1 << 30)
    settings |= dict(enforce_eager=not torch.cuda.is_available(), enable_prefix_caching=False) | SHARE
    engines = [LLM(str(model), **settings) for model in models]
    taken = [[] for _ in engines]
    with ExitStack() as stack:
        for llm in engines:
            stack.enter_context(decoding(llm, batch=1, context=CONTEXT, room=ROUNDS * STEPS + 8))
        for _ in range(ROUNDS):
            for llm, times in zip(engines, taken, strict=True):
                times += [step_s(llm) for _ in range(STEPS)]
    held = [held_in_decode(llm, KV_TOKENS) * block_bytes(llm) for llm in engines]
    return [(size, statistics.median(times)) for size, times in zip(held, taken, strict=True)]


def table(made: dict[int, Made], found: dict[Path, list[float]], source: Path, costs: list[tuple[int, float]]) -> list:
    """`costs` of the source, then of each T."""
    kv, next_s = costs[0]

    def row(name: str, t: int | str, perplexity: float, model: Path, cost: tuple[int, float]) -> list:
        ours = [f"{cost[0] / 2**20:.1f} MiB (1/{kv / cost[0]:.1f})", f"{1 / cost[1]:.1f} ({next_s / cost[1]:.2f}x)"]
        return [name, t, f"{perplexity:,.1f}", *(f"{score:.3f}" for score in found[model]), *ours]

    source_perplexity = next(iter(made.values())).report["held_out_perplexity"]["source"]
    rows = [row("the source", "", source_perplexity, source, costs[0])]
    for (t, model), cost in zip(made.items(), costs[1:], strict=True):
        perplexity = model.report["held_out_perplexity"]
        rows.append(row("after initialisation", t, perplexity["before"], model.start, cost))
        rows.append(row("after healing", t, perplexity["after"], model.healed, cost))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path, help="a text file; examples/training/distill.py holds some of it out")
    parser.add_argument("--steps", type=int, default=16, help=f"of {STEP_ROWS * ROW} tokens each")
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    parser.add_argument("--keep", type=Path, help="folder for what is made")
    arguments, more = parser.parse_known_args()
    subprocess.run([sys.executable, "examples/evaluation/fetch.py"], cwd=ROOT, check=True)
    source, limit = arguments.source.resolve(), arguments.limit
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        made = {t: make(source, arguments.text, folder, t, arguments.steps, more) for t in ITERATIONS}
        models = [source, *(path for model in made.values() for path in (model.start, model.healed))]
        found = {model: scores(model, limit) for model in models}
        costs = serve([source, *(model.healed for model in made.values())])
    one = next(iter(made.values())).report
    note = (
        f"{source.name}, half of its layers in the self-decoder, W = {WINDOW}. Healing: {arguments.steps} steps, "
        f"{one['training_tokens']:,} tokens. Perplexity of {one['held_out_tokens']:,} held-out tokens; "
        f"the first {limit} items of each task, niah of {RULER_TOKENS} tokens; KV cache of {KV_TOKENS} tokens and "
        f"decode steps at {CONTEXT}, one request, float32, medians of {ROUNDS * STEPS} in turn. "
        "In brackets: the source's KV cache over this one, and this speed over the source's."
    )
    header = ["model", "T", "held-out perplexity", "PIQA", "BoolQ", RULER[0], "KV cache", "decode tokens/s"]
    print_table("Healing", note, header, table(made, found, source, costs))


if __name__ == "__main__":
    main()
