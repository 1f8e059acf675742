"""A plan accounts for every tensor of a source, whatever its schema."""

import json

import torch
from harness import foreign_sources as sources
from harness.conversions import convert, planned
from safetensors.torch import load_file


def test_another_dtype(tmp_path):
    weights = sources.yoco2024_weights(sources.YOCO2024)
    sources.save_yoco2024(tmp_path, sources.YOCO2024, weights)
    convert(tmp_path, tmp_path / "converted", dtype="bfloat16")
    tensors = load_file(tmp_path / "converted" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    torch.testing.assert_close(tensors["model.embed_tokens.weight"], weights["embed_tokens.weight"].bfloat16())
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["dtype"] == "bfloat16"


def test_every_source_tensor_is_used_or_named(tmp_path):
    config = sources.AUTHORS | dict(weight_tying=True, tie_word_embeddings=True)
    weights = sources.authors_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = 5000.0 ** -(torch.arange(8) / 8)
    sources.save_authors(tmp_path, config, weights)
    plan = planned(tmp_path, tmp_path / "converted")
    assert {step.source for step in plan.steps} | set(plan.left_out) == set(weights)
    assert set(plan.left_out) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
