"""`vllm bench serve` against `vllm serve`: one request mix, skipping on and off, prefix caching on and off."""

from benchmarks.engine import config

import json
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.console import progress, publish
from benchmarks.precision import in_each_dtype
from benchmarks.results import Result
from benchmarks.server import VLLM, Server, serving, user_environment
from benchmarks.tables.comparisons import FIGURES
from vllm_yocou.config import YocoUConfig

SHAPE, ROUNDS = "57M", 2
LIMIT_S = 3600  # of a server, which must outlive the runs against all servers
TOKENIZER = Path(__file__).parent.parent / "examples" / "yoco-u-kjv"
SETTINGS = "--load-format dummy --max-model-len 4096 --max-num-seqs 8 --host 127.0.0.1"
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


def tokenized(folder: Path, cfg: YocoUConfig) -> Path:
    """A checkpoint without weights that has a tokenizer."""
    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    cfg.save_pretrained(folder)
    return folder


def asked(server: Server, folder: Path, requests: int, mix: str, timeout_s: float = 600) -> dict[str, Any]:
    """What `vllm bench serve` finds with so many requests of a mix, with the figures of each request."""
    command = [VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url, "--model", server.model]
    command += ["--tokenizer", str(TOKENIZER), "--dataset-name", "random", "--ignore-eos", *mix.split()]
    command += ["--num-prompts", str(requests), "--save-result", "--save-detailed"]
    command += ["--result-dir", str(folder), "--result-filename", "result.json"]
    subprocess.run(command, env=user_environment(), check=True, capture_output=True, timeout=timeout_s)
    result = json.loads((folder / "result.json").read_text())
    assert result["completed"] == requests
    return result


def figures(server: Server, folder: Path, seed: int, prompts: int) -> dict[str, float]:
    mix = f"--random-prefix-len {PREFIX} --random-input-len {INPUT} --random-output-len {OUTPUT}"
    result = asked(server, folder, prompts, f"{mix} --max-concurrency {CONCURRENCY} --seed {seed}")
    return {name: result[key] for name, (key, _) in FIGURES.items()}


def measure(dtype: str = "float32") -> Result:
    cfg = config(SHAPE)
    sizes = dict(shape=SHAPE, kv_heads=cfg.num_key_value_heads, dtype=dtype, prompts=PROMPTS, prefix=PREFIX)
    sizes |= dict(input=INPUT, output=OUTPUT, concurrency=CONCURRENCY)
    result = Result.here("bench_serve", **sizes, rounds=ROUNDS)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        checkpoint = tokenized(folder / "checkpoint", cfg)
        command = [VLLM, "serve", str(checkpoint), "--dtype", dtype, *SETTINGS.split()]
        # All servers are up at once; one without requests takes no time from the others.
        servers = {
            way: stack.enter_context(serving([*command, *more], folder / f"{i}.log", limit_s=LIMIT_S))
            for i, (way, more) in enumerate(WAYS.items())
        }
        progress("servers are ready")
        for server in servers.values():
            figures(server, folder, ROUNDS, WARM_UP)
        for seed in range(ROUNDS):
            for way, server in servers.items():
                progress(f"{way}, run {seed + 1} of {ROUNDS}")
                runs[way].append(figures(server, folder, seed, PROMPTS))
    for way, found in runs.items():
        for name in FIGURES:
            unit = "ms" if name.endswith("ms") else "1/s"
            result.add(name, unit, [one[name] for one in found], way=way)
    return result


if __name__ == "__main__":
    publish(in_each_dtype(measure))
