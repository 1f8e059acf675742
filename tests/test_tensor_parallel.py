"""Two ranks on one machine: sharded heads in the self-decoder, one replicated KV head in the cross-decoder."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import tiny
from conftest import user_environment
from oracle import Oracle

PROGRAM = Path(__file__).with_name("tensor_parallel.py")


def test_two_ranks_are_exact(tmp_path):
    model = tiny.model(tiny.config(cross_num_attention_heads=4, cross_num_key_value_heads=1, qk_norm="all"))
    model.save_pretrained(tmp_path)
    prompts = [tiny.prompt(length) for length in (1, 15, 16, 17, 130, 333)]
    # One core for each rank; vLLM would give all cores to the first.
    environment = user_environment() | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    run = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path)],
        input=json.dumps(prompts),
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    oracle = Oracle(model)
    for prompt, result in zip(prompts, json.loads(line.removeprefix("RESULT ")), strict=True):
        completion = SimpleNamespace(token_ids=result["token_ids"], logprobs=logprobs(result["logprobs"]))
        oracle.compare(
            prompt, SimpleNamespace(outputs=[completion], prompt_logprobs=logprobs(result["prompt_logprobs"]))
        )
    oracle.check()


def logprobs(rows: list) -> list:
    """vLLM's shape again, from JSON."""
    return [row and {int(token): SimpleNamespace(logprob=value) for token, value in row.items()} for row in rows]
