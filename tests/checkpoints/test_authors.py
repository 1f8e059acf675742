"""A folder that the authors exported computes the same converted; what cannot be converted is refused by name."""

import json
import re

import pytest
import torch
from harness import foreign_sources as sources
from harness.conversions import TOKENS, convert, converted_logits, planned, save_changed

FAMILY = sources.AUTHORS_FAMILY
WEIGHTS = {name: sources.authors_weights(config) for name, config in FAMILY.items()}
# The default limit, which moe-june has, is far above what small random weights reach.
WEIGHTS["moe-june"] = {
    name: tensor * (20 if "w13" in name or "gate_up" in name else 1) for name, tensor in WEIGHTS["moe-june"].items()
}


@pytest.mark.parametrize("name", FAMILY)
def test_it_computes_the_same(name, tmp_path):
    source, destination = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    sources.save_authors(source, FAMILY[name], WEIGHTS[name])
    (source / "tokenizer.json").write_text("{}")
    convert(source, destination)
    expected = sources.authors_logits(FAMILY[name], WEIGHTS[name], TOKENS)
    exact = 2e-6 if "moe_expert_num" in FAMILY[name] else 1e-12  # a router is divided by its rows' lengths in float32
    torch.testing.assert_close(converted_logits(destination, torch.float64), expected, atol=exact, rtol=0)
    saved = json.loads((destination / "config.json").read_text())
    assert (saved["model_type"], saved["residual_in_fp32"], saved["eos_token_id"]) == ("yoco_u", True, 1)
    assert saved["sliding_window"] == FAMILY[name]["yoco_window_size"] + 1
    assert saved.get("shared_expert_gate") == (True if "moe_expert_num" in FAMILY[name] else None)
    assert (destination / "tokenizer.json").exists()


# What each configuration is there to show, changed to what a converter that ignores it would compute.
IGNORED = [
    ("dense-original", dict(qk_norm=False)),
    ("dense-original", dict(logit_scale=1.0)),
    ("dense-original", dict(rope_theta=10000.0)),
    ("dense-original", dict(yoco_window_size=3)),
    ("dense-v2-clip", dict(qk_rms_clip=False)),
    ("dense-v2-clip", dict(qk_rms_limit=3.0)),
    ("dense-v2-clip", dict(swiglu_limit=10.0)),
    ("dense-v2-clip", dict(universal_loop=1)),
    ("moe-june", dict(qk_norm=False)),
    ("moe-june", dict(qk_norm_self_only=True)),
    ("moe-june", dict(swiglu_limit=0.0)),
    ("moe-june", dict(moe_top_k=1)),
    ("moe-v3-latent", dict(diff_v3=False, diff_v2=True)),
    ("moe-v3-latent", dict(qk_rms_clip=False)),
    ("moe-v3-latent", dict(swiglu_limit=10.0)),
    ("moe-v3-latent", dict(moe_latent_norm=False)),
    ("mixed-v3", dict(qk_norm=False)),
    ("mixed-v3", dict(yoco_window_size=2)),
]


@pytest.mark.parametrize("name, ignored", IGNORED)
def test_a_switch_that_were_ignored_would_be_seen(name, ignored):
    weights = WEIGHTS[name]
    if ignored.get("diff_v2"):  # its gates are half as many
        weights = {key: tensor[1::2] if "lambda_proj" in key else tensor for key, tensor in weights.items()}
    meant, otherwise = (
        sources.authors_logits(config, chosen, TOKENS)
        for config, chosen in ((FAMILY[name], WEIGHTS[name]), (FAMILY[name] | ignored, weights))
    )
    assert (meant - otherwise).abs().max() > 1e-4


def test_a_router_that_is_not_divided_would_be_seen(tmp_path):
    """Flagged as divided, the rows of a router that was not are used as they are."""
    source, destination = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    sources.save_authors(source, FAMILY["moe-june"] | dict(router_weights_normalized=True), WEIGHTS["moe-june"])
    convert(source, destination)
    expected = sources.authors_logits(FAMILY["moe-june"], WEIGHTS["moe-june"], TOKENS)
    assert (converted_logits(destination, torch.float64) - expected).abs().max() > 1e-3


def test_older_names_of_the_global_keys_and_values(tmp_path):
    weights = sources.authors_weights(sources.AUTHORS)
    older = {name: weights[f"model.{name}_proj.weight"] for name in "kv"}
    save_changed(
        tmp_path,
        tensors={f"model.{name}_proj.weight": None for name in "kv"}
        | {f"model.yoco_{name}_proj.weight": tensor for name, tensor in older.items()},
    )
    made = {step.target: step for step in planned(tmp_path, tmp_path / "converted").steps}
    for name, tensor in older.items():
        step = made[f"model.global_kv.{name}_proj.weight"]
        assert step.source == f"model.yoco_{name}_proj.weight" and torch.equal(step.tensor.read(), tensor)


def test_a_context_that_the_source_does_not_say(tmp_path):
    save_changed(tmp_path, keys={"max_seq_len": -1})
    assert planned(tmp_path, tmp_path / "converted", context=300).config.max_position_embeddings == 300


MOE = sources.AUTHORS_MOE
W13 = "model.layers.0.mlp.experts.w13_weight"
GATE_UP = "model.layers.0.mlp.shared_experts.gate_up_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def test_what_predicts_further_tokens_is_left_out_with_its_biases(tmp_path):
    bias = "mtp_block.self_attn.q_proj.bias"
    save_changed(tmp_path, tensors={bias: torch.ones(2)})
    assert planned(tmp_path, tmp_path / "converted").left_out[bias] == "predicts further tokens in training"


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(keys={"model_type": "yoco_u"}), "there is nothing to convert"),
        (dict(keys={"model_type": "yoco_vl"}), "'yoco_vl': the model reads images"),
        (dict(keys={"model_type": "llama"}), "of model_type 'llama'"),
        (dict(keys={"attention_bias": True}), "'attention_bias' is True: the authors' serving code has no place"),
        (dict(keys={"headwise_glu": True}), "'headwise_glu' is True: the authors' serving code has no place"),
        (dict(tensors={BIAS: torch.ones(64)}), f"the source has {BIAS}: the authors' serving code leaves biases out"),
        (dict(tensors={"model.v_proj.weight": None}), "missing: model.v_proj.weight"),
        (dict(tensors={"model.extra.weight": torch.ones(2)}), "unexpected: model.extra.weight"),
        (dict(tensors={"model.rotary_emb.inv_freq": torch.ones(8)}), "unexpected: model.rotary_emb.inv_freq"),
        (dict(tensors={"model.norm.weight": torch.ones(2)}), "misshapen: model.norm.weight is [2] instead of [48]"),
        (dict(tensors={"model.norm.weight": torch.ones(48, dtype=torch.int8)}), "model.norm.weight is of torch.int8"),
        (
            dict(tensors={"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}),
            "model.norm.weight is of torch.float8_e4m3fn",
        ),
        (
            dict(tensors={"model.layers.4.self_attn.k_proj.weight": torch.ones(2, 2)}),
            "unexpected: model.layers.4.self_attn.k_proj.weight",
        ),
        (
            dict(tensors={"model.layers.0.self_attn.gate_proj.weight": torch.ones(4, 48)}),
            "unexpected: model.layers.0.self_attn.gate_proj.weight",
        ),
        (dict(tensors={"model.yoco_k_proj.weight": torch.ones(48, 48)}), "unexpected: model.yoco_k_proj.weight"),
        (dict(config=MOE, tensors={W13: None}), f"missing: {W13}. Correct"),
        (dict(config=MOE, tensors={W13: torch.ones(200, 48)}), f"{W13} is [200, 48] instead of [192, 48]"),
        (dict(config=MOE, tensors={GATE_UP: torch.ones(40, 48)}), f"{GATE_UP} is [40, 48] instead of [80, 48]"),
        (dict(config=MOE, tensors={"model.layers.0.mlp.shared_gate.weight": None}), "missing: model.layers.0.mlp.sha"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, complaint, tmp_path):
    save_changed(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        planned(tmp_path, tmp_path / "converted")
