"""Drafts that the model accepts, in CUDA graphs of several rows a request."""

import pytest
import torch
from harness import tiny
from harness.engines import generate, metric
from harness.half_precision import HalfPrecision

ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
# What repeats itself has drafts; what does not has refused ones.
PROMPTS = [tiny.prompt(9) * 11, tiny.prompt(1), tiny.prompt(100)]


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
@pytest.mark.parametrize("method", ["ngram", "ngram_gpu"])
def test_speculation_by_ngrams(method, backend, engine, tmp_path):
    """Both search on the GPU with vLLM's V2 runner; `ngram_gpu` alone keeps asynchronous scheduling in vLLM 0.32."""
    model = tiny.model(tiny.config())
    model.save_pretrained(tmp_path)
    speculation = {"method": method, "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = engine(
        tmp_path,
        dtype="bfloat16",
        attention_backend=backend,
        speculative_config=speculation,
        compilation_config={},
    )
    before, deviation = metric(llm, ACCEPTED), HalfPrecision(model, torch.bfloat16)
    for prompt, output in zip(PROMPTS, generate(llm, PROMPTS, tokens=32), strict=True):
        deviation.compare(prompt, output)
    deviation.check()
    assert metric(llm, ACCEPTED) > before
