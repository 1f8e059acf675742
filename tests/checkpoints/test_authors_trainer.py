"""A state dict of the authors' trainer computes the same converted, biases and gates of heads included."""

import json
import re

import pytest
import torch
from harness import foreign_sources as sources
from harness.conversions import TOKENS, convert, converted_logits, planned, save_changed_state

CONFIGS = sources.AUTHORS_FAMILY | {"train-only": sources.TRAIN_ONLY}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_the_same(name, tmp_path):
    source, destination = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    weights = sources.authors_weights(CONFIGS[name])
    sources.save_trainer(source, CONFIGS[name], sources.trainer_weights(CONFIGS[name], weights))
    convert(source, destination)
    expected = sources.authors_logits(CONFIGS[name], weights, TOKENS)
    exact = 2e-6 if "moe_expert_num" in CONFIGS[name] else 1e-12  # a router is divided by its rows' lengths in float32
    torch.testing.assert_close(converted_logits(destination, torch.float64), expected, atol=exact, rtol=0)


@pytest.mark.parametrize("ignored", ["headwise_glu", "attention_bias"])
def test_a_switch_that_were_ignored_would_be_seen(ignored):
    weights = sources.authors_weights(sources.TRAIN_ONLY)
    without = {name: tensor for name, tensor in weights.items() if not name.endswith(".bias")}
    config = sources.TRAIN_ONLY | {ignored: False}
    otherwise = sources.authors_logits(config, without if ignored == "attention_bias" else weights, TOKENS)
    assert (sources.authors_logits(sources.TRAIN_ONLY, weights, TOKENS) - otherwise).abs().max() > 1e-2


@pytest.mark.parametrize("dimensions", [2, 3])
def test_gates_that_are_stored_by_half_are_interleaved(dimensions, tmp_path):
    """An older trainer's, with `diff_both_lamb`: first those of all first heads, then those of all second heads."""
    config = sources.AUTHORS | dict(diff_v3=True)
    weights = sources.authors_weights(config)
    state = sources.trainer_weights(config, weights)
    for name, tensor in state.items():
        if name.endswith("gate_proj.weight") and "self_attn" in name:
            halves = torch.stack([tensor[::2], tensor[1::2]])
            state[name] = halves if dimensions == 3 else halves.flatten(0, 1)
    older = sources.AUTHORS | dict(diff_attention=True, diff_both_lamb=True)
    (tmp_path / "source").mkdir()
    sources.save_trainer(tmp_path / "source", older, state)
    convert(tmp_path / "source", tmp_path / "converted")
    expected = sources.authors_logits(config, weights, TOKENS)
    found = converted_logits(tmp_path / "converted", torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_what_only_training_uses_is_left_out_by_name(tmp_path):
    counters = {
        "layers.0.mlp.moe_loss.tokens": torch.ones(4, dtype=torch.int64),
        "mtp_block.proj.weight": torch.ones(2, 2),
        "mtp_norm.weight": torch.ones(2),
        "mtp_block.self_attn.q_proj.bias": torch.ones(2),
    }
    save_changed_state(tmp_path, tensors=counters, keys=dict(mtp_n=1))
    plan = planned(tmp_path, tmp_path / "converted")
    assert set(plan.left_out) == set(counters)
    assert "mtp_norm.weight -> left out: predicts further tokens in training" in list(plan.account())


GATE = "layers.0.self_attn.gate_proj.weight"


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(keys=dict(headwise_glu=True, diff_v3=True)), "'headwise_glu' is True: differential attention (v3) has"),
        (dict(keys=dict(headwise_glu=True)), "missing: model.layers.0.self_attn.gate_proj.weight"),
        (dict(keys=dict(attention_bias=True)), "missing: model.k_proj.bias"),
        (dict(keys=dict(diff_both_lamb=True)), "'diff_both_lamb' is True: the order of its gates is known only for"),
        (dict(keys=dict(diff_both_lamb=True, diff_v3=True)), "'diff_both_lamb' is True"),
        (dict(keys=dict(dropout=0.1)), "'dropout' (0.1), and what that changes is not known here"),
        (dict(tensors={GATE: torch.ones(4, 48)}), f"unexpected: {GATE}"),
        (
            dict(tensors={"layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            "unexpected: layers.0.self_attn.q_proj.bias",
        ),
        (
            dict(tensors={"layers.0.self_attn.o_proj.weight": torch.ones(4, 16, 48)}),
            "layers.0.self_attn.o_proj.weight is [4, 16, 48] instead of [48, 64]",
        ),
        (
            dict(tensors={GATE: torch.ones(4, 48), "layers.0.self_attn.lambda_proj.weight": torch.ones(4, 48)}),
            "layers.0.self_attn.lambda_proj.weight beside layers.0.self_attn.gate_proj.weight",
        ),
        (dict(tensors={"layers.0.mlp.draft.weight": torch.ones(2)}), "unexpected: layers.0.mlp.draft.weight"),
        (dict(tensors={"output.weight": None}), "missing: lm_head.weight"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, complaint, tmp_path):
    save_changed_state(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        planned(tmp_path, tmp_path / "converted")


def test_a_metadata_without_arguments_is_another_schema(tmp_path):
    (tmp_path / "metadata.json").write_text(json.dumps({"modelargs": None}))
    with pytest.raises(ValueError, match=r"their trainer's metadata\.json \(with modelargs\)"):
        planned(tmp_path, tmp_path / "converted")
