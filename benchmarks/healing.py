"""How good a YOCO-U model made of a Llama is, after initialisation and after healing, for each T.

    python -m benchmarks healing LLAMA prose.txt --steps 16 --keep healed

Runs `vllm-yocou upcycle` and examples/training/distill.py as a user does, then lm-eval and decode steps in vLLM. With
--keep the healed checkpoints stay, those found there are not made again, and a stopped run goes on. All other options
go to distill.py: --precision bfloat16 --batch 8 --accumulate 1 on a GPU.
"""

from benchmarks.engine import SHARE, block_bytes, decoding, step_s

import argparse
import json
import math
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from vllm import LLM

from benchmarks.console import progress, publish
from benchmarks.evaluation import COMMON, ROOT, RULER, RULER_TOKENS, evaluate
from benchmarks.kv_layout import held_in_decode
from benchmarks.results import Key, Result
from benchmarks.server import user_environment
from benchmarks.tables.quality import SCORES

UPCYCLE = str(Path(sys.executable).with_name("vllm-yocou"))
DISTILL = ROOT / "examples" / "training" / "distill.py"
ITERATIONS = (1, 2, 3)
WINDOW, ROW, STEP_ROWS = 256, 1024, 8  # tokens of a window and of a training row, rows of a step
TASKS = (*COMMON, RULER[0])
KV_TOKENS, CONTEXT = 8192, 8000  # of the request whose KV cache is counted, and of the one that decodes
STEPS, ROUNDS = 10, 5
SOURCE = "the source"


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
        command = [sys.executable, str(DISTILL), str(source), str(start), str(healed)]
        command += ["--text", str(text), "--steps", str(steps), "--every", str(math.ceil(steps / 20))]
        command += ["--sequence", str(ROW), "--accumulate", str(STEP_ROWS), *more]
        if any((healed / "steps").glob("checkpoint-*/trainer_state.json")):
            command.append("--resume")
        subprocess.run(command, env=user_environment(), stdout=sys.stderr, check=True)
    return Made(start, healed, json.loads(report.read_text()))


def scores(model: Path, limit: int) -> dict[str, float]:
    """The first metric of each task, by its name in the table: accuracies, and the share of needles found."""
    found = evaluate(model, "vllm", TASKS, limit).metrics
    return {name: next(iter(found[task].values())) for name, task in zip(SCORES, TASKS, strict=True)}


def serve(models: list[Path]) -> list[tuple[int, list[float]]]:
    """For each model, KV bytes of a request of KV_TOKENS and seconds of the decode steps of a request of CONTEXT."""
    settings: dict[str, Any] = dict(
        dtype="float32", max_model_len=KV_TOKENS, max_num_seqs=1, kv_cache_memory_bytes=1 << 30
    )
    settings |= dict(enforce_eager=not torch.cuda.is_available(), enable_prefix_caching=False) | SHARE
    engines = [LLM(str(model), **settings) for model in models]
    taken: list[list[float]] = [[] for _ in engines]
    with ExitStack() as stack:
        for llm in engines:
            stack.enter_context(decoding(llm, batch=1, context=CONTEXT, room=ROUNDS * STEPS + 8))
        for _ in range(ROUNDS):
            for llm, times in zip(engines, taken, strict=True):
                times += [step_s(llm) for _ in range(STEPS)]
    held = [held_in_decode(llm, KV_TOKENS) * block_bytes(llm) for llm in engines]
    return list(zip(held, taken, strict=True))


def measure(source: Path, text: Path, steps: int, limit: int, folder: Path, more: list[str]) -> Result:
    """Models that are made stay in `folder`; those found there are not made again."""
    made = {}
    for t in ITERATIONS:
        progress(f"upcycling and healing, T = {t}")
        made[t] = make(source, text, folder, t, steps, more)
    one = next(iter(made.values())).report
    sizes: dict[str, Any] = dict(source=source.name, window=WINDOW, steps=steps, limit=limit, ruler_tokens=RULER_TOKENS)
    sizes |= dict(training_tokens=one["training_tokens"], held_out_tokens=one["held_out_tokens"])
    sizes |= dict(kv_tokens=KV_TOKENS, context=CONTEXT, decode_steps=ROUNDS * STEPS, dtype="float32")
    result = Result.here("healing", **sizes, arguments=more)

    def add(perplexity: float, folder: Path, **of: Key) -> None:
        progress(f"lm-eval, {', '.join(map(str, of.values()))}")
        result.add("held-out perplexity", "", perplexity, **of)
        for name, score in scores(folder, limit).items():
            result.add(name, "", score, **of)

    add(one["held_out_perplexity"]["source"], source, model=SOURCE)
    for t, each in made.items():
        perplexity = each.report["held_out_perplexity"]
        add(perplexity["before"][str(t)], each.start, model="after initialisation", T=t)
        add(perplexity["after"][str(t)], each.healed, model="after healing", T=t)
    progress("decode steps in vLLM")
    of_all: list[dict[str, Key]] = [{"model": SOURCE}]
    of_all += [{"T": t} for t in made]
    costs = serve([source, *(model.healed for model in made.values())])
    for of, (held, times) in zip(of_all, costs, strict=True):
        result.add("KV cache", "MiB", held / 2**20, **of)
        result.add("decode step", "s", times, **of)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path, help="a text file; examples/training/distill.py holds some of it out")
    parser.add_argument("--steps", type=int, default=16, help=f"of {STEP_ROWS * ROW} tokens each")
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    parser.add_argument("--keep", type=Path, help="folder for what is made")
    arguments, more = parser.parse_known_args()
    subprocess.run([sys.executable, "examples/evaluation/fetch.py"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        source = arguments.source.resolve()
        publish(measure(source, arguments.text, arguments.steps, arguments.limit, folder, more))


if __name__ == "__main__":
    main()
