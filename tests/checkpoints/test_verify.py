"""Every deviation of a checkpoint from its config is named."""

import pytest
import torch
from harness import tiny

from vllm_yocou.checkpoints.verify import verified


def test_all_deviations_are_named_at_once():
    cfg = tiny.config()
    weights = dict(tiny.model(cfg).state_dict())
    del weights["model.global_kv.v_proj.weight"]
    weights["model.self_decoder.layers.2.mlp.up_proj.weight"] = torch.zeros(3)
    weights["model.cross_decoder.layers.0.cross_attn.q_proj.weight"] = torch.zeros(4, 96)
    with pytest.raises(ValueError, match=r"does not fit its config\.json") as refusal:
        list(verified(weights.items(), cfg))
    message = str(refusal.value)
    assert "missing: model.global_kv.v_proj.weight;" in message
    assert "unexpected: model.self_decoder.layers.2.mlp.up_proj.weight;" in message
    assert "misshapen: model.cross_decoder.layers.0.cross_attn.q_proj.weight is [4, 96] instead of [128, 96]" in message


def test_a_long_list_is_counted():
    cfg = tiny.config()
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more\."):
        list(verified([], cfg))


def test_a_second_copy_of_tied_embeddings_is_taken_for_one():
    cfg = tiny.config(tie_word_embeddings=True)
    weights = tiny.model(cfg).state_dict()
    assert "lm_head.weight" in weights
    assert "lm_head.weight" not in dict(verified(weights.items(), cfg))


@pytest.mark.parametrize("quantized", [False, True])
def test_scales_of_kv_caches_are_named(quantized):
    """Nothing would multiply by them: a checkpoint that relies on them must not be served as if it did not."""
    cfg = tiny.config()
    scale = "model.self_decoder.layers.0.self_attn.k_scale"
    weights = tiny.model(cfg).state_dict() | {scale: torch.ones(())}
    with pytest.raises(ValueError, match=f"unexpected: {scale}"):
        list(verified(weights.items(), cfg, quantized))


def test_a_quantized_checkpoint_has_its_biases_and_gates_as_they_were():
    cfg = tiny.config(differential_attention="v2", attention_bias=True)
    weights = dict(tiny.model(cfg).state_dict())
    assert len(list(verified(weights.items(), cfg, quantized=True))) == len(weights)
    layer = "model.self_decoder.layers.0.self_attn"
    del weights[f"{layer}.q_proj.bias"]
    weights[f"{layer}.lambda_proj.weight_packed"] = weights.pop(f"{layer}.lambda_proj.weight")
    missing = f"missing: {layer}.lambda_proj.weight, {layer}.q_proj.bias; "
    with pytest.raises(ValueError, match=f"{missing}unexpected: {layer}.lambda_proj.weight_packed"):
        list(verified(weights.items(), cfg, quantized=True))
