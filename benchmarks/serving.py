"""`vllm bench serve` against `vllm serve`: one request mix, skipping on and off, prefix caching on and off."""

import json
import shutil
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.engine import config
from benchmarks.server import VLLM, Server, serving, user_environment
from benchmarks.table import print_table

SHAPE, ROUNDS = "57M", 2
LIMIT_S = 3600  # of a server, which outlives the runs against all of them
TOKENIZER = Path(__file__).parent.parent / "examples" / "yoco-u-kjv"
SETTINGS = "--load-format dummy --dtype float32 --max-model-len 4096 --max-num-seqs 8 --host 127.0.0.1"
SETTINGS += " --kv-cache-memory-bytes 1G --gpu-memory-utilization 0.15 --enforce-eager"
WAYS = {
    "skipping, prefix caching": [],
    "skipping": ["--no-enable-prefix-caching"],
    "every row, prefix caching": ["--additional-config", '{"yocou": {"skip_rows": false}}'],
    "every row": ["--no-enable-prefix-caching", "--additional-config", '{"yocou": {"skip_rows": false}}'],
}
# All prompts begin alike: a system prompt, then a question.
PREFIX, INPUT, OUTPUT, CONCURRENCY = 1024, 256, 32, 4
PROMPTS, WARM_UP = 20, 4
FIGURES = {
    "request_throughput": "requests/s",
    "total_token_throughput": "tokens/s, prompts and answers",
    "median_ttft_ms": "median time to first token, ms",
    "median_tpot_ms": "median time of a further token, ms",
}


def figures(server: Server, folder: Path, seed: int, prompts: int) -> list[float]:
    mix = f"--dataset-name random --random-prefix-len {PREFIX} --random-input-len {INPUT} --random-output-len {OUTPUT}"
    mix += f" --num-prompts {prompts} --max-concurrency {CONCURRENCY} --seed {seed} --ignore-eos"
    command = [VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url, "--model", server.model]
    command += ["--tokenizer", str(TOKENIZER), *mix.split()]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", "result.json"]
    subprocess.run(command, env=user_environment(), check=True, capture_output=True, timeout=600)
    result = json.loads((folder / "result.json").read_text())
    assert result["completed"] == prompts
    return [result[key] for key in FIGURES]


def table(medians: dict[str, list[float]]) -> list[list[str]]:
    """`medians` of FIGURES; beside each what it is to the last way's."""
    *_, last = medians.values()
    return [
        [way, *(f"{value:,.2f} ({value / base:.2f}x)" for value, base in zip(values, last, strict=True))]
        for way, values in medians.items()
    ]


def main() -> None:
    runs = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        shutil.copytree(TOKENIZER, checkpoint, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        config(SHAPE).save_pretrained(checkpoint)
        # All at once: a server without requests takes no time from the others.
        servers = {
            way: stack.enter_context(
                serving(
                    [VLLM, "serve", str(checkpoint), *SETTINGS.split(), *more], folder / f"{i}.log", limit_s=LIMIT_S
                )
            )
            for i, (way, more) in enumerate(WAYS.items())
        }
        for server in servers.values():
            figures(server, folder, ROUNDS, WARM_UP)
        for seed in range(ROUNDS):
            for way, server in servers.items():
                runs[way].append(figures(server, folder, seed, PROMPTS))
    medians = {way: [statistics.median(part) for part in zip(*taken, strict=True)] for way, taken in runs.items()}
    note = (
        f"{SHAPE} shape, 4 KV heads, random weights, float32, eager: {PROMPTS} prompts of {PREFIX} common tokens and "
        f"{INPUT} of their own, {OUTPUT} tokens of answer, {CONCURRENCY} at a time; medians of {ROUNDS} runs in turn, "
        "and beside each what it is to the last line's."
    )
    print_table("Serving", note, ["", *FIGURES.values()], table(medians))


if __name__ == "__main__":
    main()
