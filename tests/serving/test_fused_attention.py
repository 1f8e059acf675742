"""The plugin's kernels inside vLLM, in Triton's interpreter: exact, and called for what they are made for."""

from types import SimpleNamespace

import pytest
import torch
from harness import tiny
from harness.oracle import check

from vllm_yocou.rows.hand_over import RowSlots, StepRows
from vllm_yocou.serving.fused_attention import CrossAttentionByKernel

SPLIT_HEADS = dict(cross_num_attention_heads=6, cross_num_key_value_heads=2, cross_head_dim=16)


@pytest.mark.parametrize("engine_process", ["v2-triton"], indirect=True)
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(
            dict(qk_norm="all", cross_decoder_rope=True, rope_interleaved=True, num_iterations=2, **SPLIT_HEADS),
            id="normed-and-turned",
        ),
        pytest.param(dict(), id="plain", marks=pytest.mark.slow),
        pytest.param(
            dict(differential_attention="v3", residual_in_fp32=True, **tiny.BIAS),
            id="differential-biased",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_exact_and_called(overrides, engine_process, tmp_path):
    """A first chunk that no cross-decoder row needs, one row a request, and a prompt whose every row is wanted."""
    config = tiny.config(**overrides)
    model = tiny.model(config)
    model.save_pretrained(tmp_path)
    plain = [{"prompt": tiny.prompt(length), "sampling": {"max_tokens": 3}} for length in (41, 5)]
    scored = [{"prompt": tiny.prompt(19), "sampling": {"max_tokens": 2, "prompt_logprobs": 1}}]
    settings = dict(max_model_len=64, additional_config={"yocou": {"kernels": True, "max_global_block": 16}})
    scored += [{"prompt": tiny.prompt(5), "sampling": {"max_tokens": 2}}]  # a neighbour with one row
    batches = engine_process.run(tmp_path, [plain, scored, plain], **settings)
    T, S, C = config.num_iterations, config.num_self_decoder_layers, config.num_cross_decoder_layers
    # The prompt of 41 once more, 32 of them out of the prefix cache.
    for requests, batch, steps, of_one_row in zip((plain, scored, plain), batches, (4, 2, 3), (3, 1, 3), strict=True):
        check(model, requests, batch.outputs)
        assert batch.metrics["window_step"] == T * S * steps
        assert batch.metrics["global_write"] == steps
        assert batch.metrics["cross_attention"] == C * of_one_row


@pytest.mark.parametrize("engine_process", ["v2-triton"], indirect=True)
def test_clipped_heads_are_left_to_vllm(engine_process, nightly, tmp_path):
    """The kernels norm heads and would not clip them."""
    model = tiny.model(tiny.config(**tiny.CLIP))
    model.save_pretrained(tmp_path)
    requests = [{"prompt": tiny.prompt(length), "sampling": {"max_tokens": 2}} for length in (5, 19)]
    settings = dict(max_model_len=64, additional_config={"yocou": {"kernels": True}})
    (batch,) = engine_process.run(tmp_path, [requests], **settings)
    check(model, requests, batch.outputs)
    assert {batch.metrics[name] for name in ("window_step", "global_write", "cross_attention")} == {0}
    assert engine_process.log.read_text().count('The option "kernels" is off: this plugin') == 1


def test_other_caches_and_chunks_are_left_to_vllm():
    """Where rows outnumber requests, even if only on the sum of them they do not, and caches of eight bits."""
    ours = type("Ours", (CrossAttentionByKernel, type("Base", (), {"forward": lambda *a, **k: "vLLM's"})), {})
    implementation = ours.__new__(ours)
    query_MHd, output = torch.zeros(2, 4, 16), torch.zeros(2, 4, 16)
    layer = SimpleNamespace(rows=RowSlots(4))
    for most_rows, dtype in ((2, torch.float32), (1, torch.uint8)):
        metadata = SimpleNamespace(max_query_len=2, num_actual_tokens=2, seq_lens=torch.zeros(9))
        layer.rows.put(metadata, StepRows(torch.tensor([0, 1]), most_rows), 2)
        cache = torch.zeros(1, 2, 16, 32, dtype=dtype)
        assert implementation.forward(layer, query_MHd, None, None, cache, metadata, output) == "vLLM's"
