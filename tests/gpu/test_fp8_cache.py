"""A KV cache in FP8 changes log probabilities by what eight bits cost, with CUDA's kernels over packed caches."""

import pytest
from harness import tiny
from harness.engines import generate, kv_cache_config, metric
from harness.oracle import Oracle

PROMPTS = [tiny.prompt(length) for length in (1, 50, 333)]
SKIPPED = "vllm:yocou_skipped_rows"


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
def test_caches_in_fp8(backend, engine, tmp_path):
    model = tiny.model(tiny.config())
    model.save_pretrained(tmp_path)
    llm = engine(tmp_path, dtype="bfloat16", kv_cache_dtype="fp8", attention_backend=backend)
    groups = kv_cache_config(llm).kv_cache_groups
    assert {group.kv_cache_spec.page_size_bytes // group.kv_cache_spec.block_size for group in groups} == {128}
    before = metric(llm, SKIPPED)
    oracle = Oracle(model)
    for prompt, output in zip(PROMPTS, generate(llm, PROMPTS), strict=True):
        oracle.compare(prompt, output, greedy=False)
    assert metric(llm, SKIPPED) - before == sum(len(prompt) - 1 for prompt in PROMPTS)
    assert 3 * oracle.rounding < oracle.difference < 0.5
