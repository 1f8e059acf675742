"""The plugin's kernels inside vLLM, in Triton's interpreter: exact, and called for what they are made for."""

import engine_process
import pytest
import tiny
from test_row_skipping import check

SPLIT_HEADS = dict(cross_num_attention_heads=6, cross_num_key_value_heads=2, cross_head_dim=16)


@pytest.mark.parametrize(
    "overrides",
    [dict(), dict(qk_norm="all", cross_decoder_rope=True, rope_interleaved=True, num_iterations=2, **SPLIT_HEADS)],
    ids=["plain", "normed-and-turned"],
)
def test_exact_and_called(overrides, tmp_path):
    """A first chunk that no cross-decoder row needs, one row a request, and a prompt whose every row is wanted."""
    config = tiny.config(**overrides)
    model = tiny.model(config)
    model.save_pretrained(tmp_path)
    plain = [{"prompt": tiny.prompt(length), "sampling": {"max_tokens": 3}} for length in (41, 5)]
    scored = [{"prompt": tiny.prompt(19), "sampling": {"max_tokens": 2, "prompt_logprobs": 1}}]
    settings = dict(max_model_len=64, additional_config={"yocou": {"kernels": True}})
    batches = engine_process.run(tmp_path, [plain, scored], "v2-triton", **settings)
    T, S, C = config.num_iterations, config.num_self_decoder_layers, config.num_cross_decoder_layers
    for requests, batch, steps, of_one_row in zip((plain, scored), batches, (4, 2), (3, 1), strict=True):
        check(model, requests, batch)
        assert batch.metrics["window_step"] == T * S * steps
        assert batch.metrics["global_write"] == steps
        assert batch.metrics["cross_attention"] == C * of_one_row
