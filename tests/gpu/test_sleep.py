"""vLLM's sleep mode frees the memory of weights and caches; what wakes up answers as before.

Level 1 keeps the weights on the host. Level 2 drops them, and they are loaded again, as RL trainers do; vLLM saves
buffers, of which the table of RoPE is one. That a model has no other tensors to lose is shown without a GPU, by
tests/serving/test_weight_update.py. vLLM's allocator takes one engine with sleep mode a process, so `make gpu-all`
gives each of these tests a process of its own.
"""

import pytest
import torch
from harness import tiny
from harness.engines import generate

PROMPTS = [tiny.prompt(length) for length in (1, 50, 333)]
POOL = 1 << 30  # bytes
VARIANT = tiny.VARIANTS["T3-S3-C2-qknorm-interleaved-W7"]
KERNELS = {"yocou": {"kernels": True}}
# Compiled, with CUDA graphs, unless said otherwise.
KINDS = {
    "dense": (tiny.config(**VARIANT), dict(attention_backend="TRITON_ATTN")),
    "kernels": (tiny.config(**VARIANT), dict(attention_backend="TRITON_ATTN", additional_config=KERNELS)),
    "tied": (tiny.config(tie_word_embeddings=True), dict(dtype="bfloat16", attention_backend="FLASH_ATTN")),
    "mixture": (tiny.moe_config(), dict(dtype="bfloat16", attention_backend="FLASH_ATTN")),
    "eager": (tiny.config(**VARIANT), dict(attention_backend="TRITON_ATTN", enforce_eager=True)),
}
DEVIATION = {"float32": 1e-3, "bfloat16": 0.1}


def sleep_and_wake(llm, level: int) -> None:
    free = torch.cuda.mem_get_info()[0]
    llm.sleep(level=level)
    assert torch.cuda.mem_get_info()[0] > free + POOL // 2
    if level == 1:
        llm.wake_up()
        return
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def same(before: list, after: list, deviation: float) -> None:
    for one, other in zip(before, after, strict=True):
        (one,), (answer,) = one.outputs, other.outputs
        assert one.token_ids == answer.token_ids
        assert one.cumulative_logprob == pytest.approx(answer.cumulative_logprob, abs=deviation)
        assert not other.num_cached_tokens  # nothing of the cache outlives the sleep


@pytest.mark.parametrize("kind", KINDS)
def test_what_wakes_up_answers_as_before(kind, engine, tmp_path):
    """Through both levels, twice: the second time what is asleep has been woken up and loaded before."""
    config, settings = KINDS[kind]
    tiny.model(config).save_pretrained(tmp_path)
    llm = engine(tmp_path, kv_cache_memory_bytes=POOL, enable_sleep_mode=True, compilation_config={}, **settings)
    before = generate(llm, PROMPTS)
    for level in (1, 2, 2, 1):
        sleep_and_wake(llm, level)
        same(before, generate(llm, PROMPTS), DEVIATION[settings.get("dtype", "float32")])


def test_before_the_first_request(engine, tmp_path):
    """The same model in an engine that never slept says what is right."""
    config, settings = KINDS["dense"]
    tiny.model(config).save_pretrained(tmp_path)
    settings = dict(kv_cache_memory_bytes=POOL, compilation_config={}, **settings)
    before = generate(engine(tmp_path, **settings), PROMPTS)
    llm = engine(tmp_path, enable_sleep_mode=True, **settings)
    sleep_and_wake(llm, 2)
    same(before, generate(llm, PROMPTS), DEVIATION["float32"])
