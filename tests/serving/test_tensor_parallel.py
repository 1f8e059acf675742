"""Two ranks on one machine: sharded query heads, KV heads sharded where there are two and replicated where one."""

import pytest
from harness import tiny
from harness.checkout import needs_compiler
from harness.oracle import agrees

POOL = " tokens at a time, "  # of the line that says how many requests fit


# None: compiled where vLLM would; a worker has read vLLM's settings for good before its first step.
@pytest.mark.parametrize(
    "kv_heads, cross_kv_heads, mode",
    [
        pytest.param(2, 1, 0, id="one-global-head", marks=pytest.mark.runner("two-ranks")),
        pytest.param(1, 2, None, id="one-window-head-compiled", marks=[needs_compiler, pytest.mark.slow]),
    ],
)
@pytest.mark.parametrize("engine_process", ["two-ranks"], indirect=True)
def test_two_ranks_are_exact(kv_heads, cross_kv_heads, mode, engine_process, tmp_path):
    heads = dict(num_key_value_heads=kv_heads, cross_num_attention_heads=4, cross_num_key_value_heads=cross_kv_heads)
    model = tiny.model(tiny.config(qk_norm="all", **heads))
    model.save_pretrained(tmp_path)
    prompts = [tiny.prompt(length) for length in (1, 15, 16, 17, 130, 333)]
    # Every other request lets its prompt rows skip, on both ranks alike.
    requests = [
        {"prompt": prompt, "sampling": {"prompt_logprobs": 2} if i % 2 else {}} for i, prompt in enumerate(prompts)
    ]
    said_before = engine_process.log.read_text().count(POOL)
    (batch,) = engine_process.run(tmp_path, [requests], compilation_config={"mode": mode}, max_num_batched_tokens=61)
    assert engine_process.log.read_text().count(POOL) == said_before + 1  # by one rank
    agrees(model, prompts, batch.outputs)
    assert batch.metrics["yocou_skipped_rows"] == sum(len(prompt) - 1 for prompt in prompts[::2])
