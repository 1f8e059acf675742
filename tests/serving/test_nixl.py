"""Prefill in one engine and decode in another, by vLLM's NixlConnector, where NIXL is installed: `pip install nixl`."""

import json
import os
import subprocess
import sys

import pytest
from harness import tiny
from harness.checkout import ROOT
from harness.engines import generate, metric
from harness.oracle import agrees

from benchmarks.server import free_port, user_environment

pytest.importorskip("nixl", reason="NIXL is not installed")
HITS = "vllm:external_prefix_cache_hits"
LIMIT_S = 300
# Shorter and longer than the window, a block and a step.
PROMPTS = [tiny.prompt(length) for length in (50, 195, 333, 416, 700)]


def transfer(role: str) -> dict:
    return dict(kv_transfer_config=dict(kv_connector="NixlConnector", kv_role=role, kv_buffer_device="cpu"))


@pytest.fixture
def model(tmp_path):
    built = tiny.model(tiny.config())
    built.save_pretrained(tmp_path)
    return built


@pytest.fixture
def sender(model, tmp_path):
    """A process that computes PROMPTS and keeps their caches until it has been asked for them."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.nixl_sender", str(tmp_path), json.dumps(transfer("kv_producer"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT / "tests",
        env=user_environment()
        | {
            "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port),
        },
    )
    yield process
    process.stdin.close()
    process.stdout.close()
    try:
        process.wait(LIMIT_S)
    finally:
        process.kill()


def test_an_engine_decodes_what_another_has_prefilled(
    engine, nightly, both_cores, model, sender, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "sched_setaffinity", lambda *arguments: None)  # NIXL would keep the tests to one core
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
    print(json.dumps(PROMPTS), file=sender.stdin, flush=True)
    places = json.loads(sender.stdout.readline())
    llm = engine(tmp_path, **transfer("kv_consumer"))
    before = metric(llm, HITS)
    outputs = [
        generate(llm, [prompt], extra_args={"kv_transfer_params": place})[0]
        for prompt, place in zip(PROMPTS, places, strict=True)
    ]
    agrees(model, PROMPTS, outputs)
    assert metric(llm, HITS) - before == sum(len(prompt) for prompt in PROMPTS)
    # What came from elsewhere is found again as if it had been computed here.
    longer = [*PROMPTS[1][:194], *tiny.prompt(9, seed=6)]
    (again,) = generate(llm, [longer])
    agrees(model, [longer], [again])
    assert again.num_cached_tokens == 192
