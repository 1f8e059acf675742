"""Every deviation of a checkpoint from its config is named."""

import re

import pytest
import torch
from harness import tiny

from vllm_yocou.checkpoints.verify import Stored, check_part, verified


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


GATE = "model.self_decoder.layers.1.mlp.shared_expert_gate.weight"


@pytest.mark.parametrize("gated", [False, True])
def test_gates_fit_as_the_config_says(gated):
    """It says that there are some, or none, or it leaves that to the weights: then there are all of them or none."""
    weights = tiny.model(tiny.moe_config(shared_expert_gate=gated)).state_dict()
    for said in (gated, None):
        assert dict(verified(weights.items(), tiny.moe_config(shared_expert_gate=said))).keys() == weights.keys()
    kind = "unexpected" if gated else "missing"
    with pytest.raises(ValueError, match=rf"does not fit its config\.json, {kind}: .*{GATE}"):
        list(verified(weights.items(), tiny.moe_config(shared_expert_gate=not gated)))
    if gated:
        del weights[GATE]
        with pytest.raises(ValueError, match=f"missing: {GATE}"):
            list(verified(weights.items(), tiny.moe_config()))


def test_a_tensor_that_is_there_twice_is_named():
    """The later one would win, whichever that is: another model's file beside it, by its name in the alphabet."""
    cfg = tiny.config()
    weights = list(tiny.model(cfg).state_dict().items())
    with pytest.raises(ValueError, match=r"holds model\.norm\.weight twice: .* move those of other models"):
        list(verified([*weights, ("model.norm.weight", torch.ones(cfg.hidden_size))], cfg))


STORED = {"a.weight": Stored((2, 3)), "b.weight": Stored((4,), torch.int8), "b.scale": Stored((1,), torch.bfloat16)}


@pytest.mark.parametrize("name", STORED)
def test_a_part_is_whatever_fits(name):
    dtype = STORED[name].dtype or torch.float16
    check_part({name: torch.zeros(STORED[name].shape, dtype=dtype)}, STORED)


@pytest.mark.parametrize(
    "name, sent, said",
    [
        ("c.weight", torch.zeros(1), "unexpected: c.weight."),
        ("a.weight", torch.zeros(3, 2), "misshapen: a.weight is [3, 2] instead of [2, 3]."),
        (
            "a.weight",
            torch.zeros(2, 3, dtype=torch.int8),
            "a.weight is of torch.int8 instead of a floating-point type.",
        ),
        ("b.weight", torch.zeros(4), "b.weight is of torch.float32 instead of torch.int8."),
        ("b.scale", torch.zeros(1, dtype=torch.float8_e4m3fn), "is of torch.float8_e4m3fn instead of torch.bfloat16."),
        ("a.weight", torch.full((2, 3), float("inf")), "hold NaN or infinity in a.weight: nothing of this part was"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_in_a_sentence(name, sent, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        check_part({"b.scale": torch.ones(1), name: sent}, STORED)
    assert "\n" not in str(refused.value)


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
