"""lm-eval through vLLM and through transformers, side by side: the same scores, for the trained model and for a Llama.

    python -m benchmarks evaluation [--llama FOLDER] [--limit 100]

The Llama runs twice in the same vLLM, with the plugin and without it; its scores must not change.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.console import progress, publish
from benchmarks.results import Result
from benchmarks.server import user_environment

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "examples" / "yoco-u-kjv"
OWN = ("kjv_next_verse", "kjv_last_word")
COMMON = ("piqa_local", "boolq_local")
RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
OF_LLAMA = (*COMMON, RULER[0])  # the only task of RULER that a model of this size solves
RULER_TOKENS = 1024
CONTEXT = 2048
# vLLM finds the plugin by itself; for transformers the architecture must be imported.
IMPORTED = "import sys, vllm_yocou.reference; from lm_eval.__main__ import cli_evaluate; sys.exit(cli_evaluate())"
BY = {"vllm": ["-m", "lm_eval"], "hf": ["-c", IMPORTED]}


Answers = list[list]  # for each item of a task, a log-likelihood or a text for each of its questions


@dataclass(frozen=True)
class Evaluated:
    """What lm-eval found, by task: its metrics by name, and the answers that they rest on."""

    metrics: dict[str, dict[str, float]]
    answers: dict[str, Answers]


def evaluate(model: Path, by: str, tasks: tuple[str, ...], limit: int, environment: dict | None = None) -> Evaluated:
    """`by` is vllm or hf."""
    arguments = f"pretrained={model},dtype=float32"
    if by == "vllm":
        arguments += f",max_model_len={CONTEXT},kv_cache_memory_bytes={1 << 30},max_num_seqs=16"
    else:
        arguments += f",max_length={CONTEXT}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *BY[by], "--model", by, "--model_args", arguments]
        command += ["--include_path", "examples/evaluation", "--tasks", ",".join(tasks), "--limit", str(limit)]
        command += ["--metadata", json.dumps({"max_seq_lengths": [RULER_TOKENS], "tokenizer": str(model)})]
        command += ["--batch_size", "auto" if by == "vllm" else "8", "--log_samples", "--output_path", folder]
        offline = dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
        environment = user_environment() | offline | (environment or {})
        subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=True)
        (results,) = Path(folder).rglob("results_*.json")
        found = json.loads(results.read_text())["results"]
        answers = {}
        for task in tasks:
            (file,) = Path(folder).rglob(f"samples_{task}_*.jsonl")
            items = sorted(map(json.loads, file.read_text().splitlines()), key=lambda item: item["doc_id"])
            # Each log-likelihood comes with a flag that says whether its answer is the greedy one.
            replies = [[reply[0] for reply in item["resps"]] for item in items]
            answers[task] = [[float(r[0]) if isinstance(r, list) else r for r in item] for item in replies]
    # RULER has a metric for each length; those that were not asked for are -1.
    metrics = {
        task: {
            metric.split(",")[0]: value
            for metric, value in found[task].items()
            if isinstance(value, float) and "stderr" not in metric and value >= 0
        }
        for task in tasks
    }
    return Evaluated(metrics, answers)


def compare(one: Answers, other: Answers) -> dict[str, tuple[str, float]]:
    """Unit and value by name: the largest difference of log-likelihoods, or the numbers of texts and of equal texts."""
    pairs = [pair for answers in zip(one, other, strict=True) for pair in zip(*answers, strict=True)]
    if isinstance(pairs[0][0], float):
        return {"largest difference": ("nats", max(abs(first - second) for first, second in pairs))}
    return {"texts": ("texts", len(pairs)), "texts alike": ("texts", sum(first == second for first, second in pairs))}


def add(result: Result, model: str, sides: dict[str, Evaluated]) -> None:
    """Add the scores of a model on both sides, and how far its answers agree, task by task."""
    (first, one), (second, other) = sides.items()
    for task, metrics in one.metrics.items():
        for name, (unit, value) in compare(one.answers[task], other.answers[task]).items():
            result.add(name, unit, value, model=model, task=task)
        for metric, score in metrics.items():
            for by, found in ((first, score), (second, other.metrics[task][metric])):
                result.add("score", "", found, model=model, task=task, metric=metric, by=by)


def measure(limit: int, llama: Path | None) -> Result:
    result = Result.here("evaluation", dtype="float32", limit=limit, ruler_tokens=RULER_TOKENS)
    sides = {}
    for by in ("hf", "vllm"):
        progress(f"{TRAINED.name} by {by}")
        sides[by] = evaluate(TRAINED, by, (*OWN, *COMMON, *RULER), limit)
    add(result, TRAINED.name, sides)
    if llama:
        sides = {}
        for by, environment in (("vllm, no plugins", {"VLLM_PLUGINS": ""}), ("vllm", {})):
            progress(f"{llama.name} by {by}")
            sides[by] = evaluate(llama, "vllm", OF_LLAMA, limit, environment)
        add(result, llama.name, sides)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="a Llama's folder, to run too")
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    arguments = parser.parse_args()
    subprocess.run([sys.executable, "examples/evaluation/fetch.py"], cwd=ROOT, check=True)
    publish(measure(arguments.limit, arguments.llama))


if __name__ == "__main__":
    main()
