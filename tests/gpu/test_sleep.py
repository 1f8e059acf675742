"""vLLM's sleep mode frees the memory of weights and caches; what wakes up answers as before."""

import pytest
import torch
from harness import tiny
from harness.engines import generate

PROMPTS = [tiny.prompt(length) for length in (1, 50, 333)]
POOL = 1 << 30  # bytes
VARIANT = tiny.VARIANTS["T3-S3-C2-qknorm-interleaved-W7"]


@pytest.mark.parametrize("level", [1, 2])
def test_what_wakes_up_answers_as_before(level, engine, tmp_path):
    """Level 1 keeps the weights on the host; level 2 drops them, and they are loaded again, as RL trainers do."""
    tiny.model(tiny.config(**VARIANT)).save_pretrained(tmp_path)
    settings = dict(
        kv_cache_memory_bytes=POOL, enable_sleep_mode=True, attention_backend="TRITON_ATTN", compilation_config={}
    )
    llm = engine(tmp_path, **settings)
    before, free = generate(llm, PROMPTS), torch.cuda.mem_get_info()[0]
    llm.sleep(level=level)
    assert torch.cuda.mem_get_info()[0] > free + POOL // 2
    if level == 1:
        llm.wake_up()
    else:
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
    for one, other in zip(before, generate(llm, PROMPTS), strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].cumulative_logprob == pytest.approx(other.outputs[0].cumulative_logprob, abs=1e-3)
        assert not other.num_cached_tokens  # nothing of the cache outlives the sleep
