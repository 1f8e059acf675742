"""A converted checkpoint of the authors' computes what their code computes; what cannot be converted is refused."""

import json
import re

import pytest
import torch
from harness import foreign_sources as sources
from harness.conversions import TOKENS, convert, converted_logits, planned, save_changed


@pytest.mark.parametrize(
    "config",
    [
        sources.AUTHORS,
        sources.AUTHORS | dict(weight_tying=True, universal_loop=1),
        sources.AUTHORS_MOE,
    ],
    ids=["dense", "tied-T1", "moe"],
)
def test_it_computes_the_same(config, tmp_path):
    weights = sources.authors_weights(config)
    source, destination = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    sources.save_authors(source, config, weights)
    (source / "tokenizer.json").write_text("{}")
    convert(source, destination)
    expected = sources.authors_logits(config, weights, TOKENS)
    torch.testing.assert_close(converted_logits(destination), expected, atol=2e-5, rtol=2e-5)
    saved = json.loads((destination / "config.json").read_text())
    assert (saved["model_type"], saved["sliding_window"], saved["eos_token_id"]) == ("yoco_u", 7, 1)
    assert saved["shared_expert_gate"] is bool(config["moe"])  # the weights, which hold one, need not be asked
    assert (destination / "tokenizer.json").exists()


def test_keys_under_our_names_may_repeat_what_is_known(tmp_path):
    save_changed(tmp_path, keys={"hidden_size": 48, "num_iterations": 3})
    assert planned(tmp_path, tmp_path / "converted").config.hidden_size == 48


def test_a_context_that_the_source_does_not_say(tmp_path):
    save_changed(tmp_path, keys={"max_seq_len": -1})
    assert planned(tmp_path, tmp_path / "converted", context=300).config.max_position_embeddings == 300


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (dict(keys={"diff_attention": True}), "'diff_attention' is True"),
        (dict(keys={"qk_rms_clip": 4.0}), "'qk_rms_clip' is 4.0"),
        (dict(keys={"new_trick": 3, "other": False}), "'new_trick' (3), 'other' (False), and what that changes"),
        (dict(keys={"hidden_size": 64}), "'hidden_size' (64), and what that changes"),
        (dict(keys={"norm_eps": None}), "'norm_eps' is missing"),
        (dict(keys={"universal_loop": None}), "'universal_loop' is missing"),
        (dict(keys={"model_type": "yoco_u"}), "there is nothing to convert"),
        (dict(keys={"model_type": "llama"}), "of model_type 'llama'"),
        (dict(keys={"yoco_cross_layers": None}), "'yoco_cross_layers' is None"),
        (dict(keys={"yoco_cross_layers": 5}), "num_self_decoder_layers is 0"),
        (dict(keys={"max_seq_len": None}), "give --context"),
        (dict(keys={"max_seq_len": -1}), "give --context"),
        (dict(keys={"universal_loop": 0}), "num_iterations is 0"),
        (dict(tensors={"model.v_proj.weight": None}), "missing: model.global_kv.v_proj.weight"),
        (dict(tensors={"model.extra.weight": torch.ones(2)}), "unexpected: model.extra.weight"),
        (dict(tensors={"model.rotary_emb.inv_freq": torch.ones(8)}), "unexpected: model.rotary_emb.inv_freq"),
        (dict(tensors={"model.norm.weight": torch.ones(2)}), "misshapen: model.norm.weight is [2] instead of [48]"),
        (dict(tensors={"model.norm.weight": torch.ones(48, dtype=torch.int8)}), "model.norm.weight is of torch.int8"),
        (
            dict(tensors={"model.layers.4.self_attn.k_proj.weight": torch.ones(2, 2)}),
            "unexpected: model.layers.4.self_attn.k_proj.weight",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, complaint, tmp_path):
    save_changed(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(complaint)):
        planned(tmp_path, tmp_path / "converted")
