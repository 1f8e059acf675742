"""Fused tensors are read in parts, routers stay float32 and have rows of length one, and no tensor is lost."""

import re

import pytest
import torch
from harness import foreign_sources as sources
from harness.conversions import convert, planned, save_changed
from safetensors.torch import load_file

LATENT = sources.AUTHORS_FAMILY["moe-v3-latent"]
ROUTER = "model.layers.0.mlp.gate.weight"
CONVERTED_ROUTER = "model.self_decoder.layers.0.mlp.gate.weight"


def test_every_part_of_a_fused_tensor_has_its_place(tmp_path):
    weights = sources.authors_weights(LATENT)
    save_changed(tmp_path, config=LATENT)
    convert(tmp_path, tmp_path / "converted", shard_bytes=20_000)
    made = {}
    for file in (tmp_path / "converted").glob("*.safetensors"):
        made |= load_file(file)
    mlp = "model.cross_decoder.layers.1.mlp"
    w13, w2 = (weights[f"model.layers.4.mlp.experts.{part}_weight"] for part in ("w13", "w2"))
    for e in range(4):
        gate, up, down = (made[f"{mlp}.experts.{e}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        assert torch.equal(torch.cat([gate, up]), w13[48 * e : 48 * e + 48])
        assert torch.equal(down, w2[20 * e : 20 * e + 20])
    both = torch.cat([made[f"{mlp}.shared_expert.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(both, weights["model.layers.4.mlp.shared_experts.gate_up_proj.weight"])


def test_a_router_is_divided_by_its_rows_lengths_in_float32(tmp_path):
    rows = torch.randn(4, 48).bfloat16()
    rows[2] = 0  # its length counts as 1e-6, so it stays zero
    save_changed(tmp_path, config=sources.AUTHORS_MOE, tensors={ROUTER: rows})
    convert(tmp_path, tmp_path / "converted", dtype="bfloat16")
    made = load_file(tmp_path / "converted" / "model.safetensors")
    assert {name for name, tensor in made.items() if tensor.dtype == torch.float32} == {
        name for name in made if name.endswith(".mlp.gate.weight")
    }
    expected = rows.double() / rows.double().pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-6)
    torch.testing.assert_close(made[CONVERTED_ROUTER].double(), expected, atol=1e-7, rtol=0)


def test_a_router_that_is_flagged_as_divided_is_kept_to_the_bit(tmp_path):
    rows = torch.randn(4, 48)
    save_changed(tmp_path, config=LATENT, tensors={ROUTER: rows})
    convert(tmp_path, tmp_path / "converted", dtype="float16")
    assert torch.equal(load_file(tmp_path / "converted" / "model.safetensors")[CONVERTED_ROUTER], rows)


def test_every_tensor_keeps_its_dtype(tmp_path):
    """As exported: bfloat16, and float32 for the router."""
    weights = sources.authors_weights(LATENT)
    kept = {name: tensor if name.endswith("mlp.gate.weight") else tensor.bfloat16() for name, tensor in weights.items()}
    save_changed(tmp_path, config=LATENT, tensors=kept)
    convert(tmp_path, tmp_path / "converted")
    made = load_file(tmp_path / "converted" / "model.safetensors")
    for name, tensor in made.items():
        assert tensor.dtype == (torch.float32 if name.endswith("mlp.gate.weight") else torch.bfloat16), name
    assert torch.equal(made["lm_head.weight"], kept["lm_head.weight"])


def test_a_dry_run_has_a_line_for_every_tensor_of_the_source(tmp_path):
    save_changed(tmp_path, config=LATENT)
    lines = list(planned(tmp_path, tmp_path / "converted", dtype="bfloat16").account())
    assert {re.split(", | -> ", line)[0] for line in lines} == set(sources.authors_weights(LATENT))
    assert len(lines) == len(sources.authors_weights(LATENT))
    first = "model.self_decoder.layers.0.mlp.experts"
    assert (
        f"model.layers.0.mlp.experts.w13_weight -> {first}.0.gate_proj.weight to {first}.3.up_proj.weight, "
        "8 tensors of [24, 20] bfloat16"
    ) in lines


def test_a_dry_run_says_what_is_changed_or_added(tmp_path):
    save_changed(tmp_path, config=sources.AUTHORS_MOE, keys=dict(qk_rms_clip=True))
    lines = list(planned(tmp_path, tmp_path / "converted", dtype="bfloat16").account())
    assert f"{ROUTER}, rows divided by their lengths, -> {CONVERTED_ROUTER} [4, 48] float32" in lines
    assert [line for line in lines if line.startswith("ones ->")] == [
        "ones -> model.self_decoder.layers.0.self_attn.q_norm.weight to "
        "model.cross_decoder.layers.1.cross_attn.q_norm.weight, 9 tensors of [16] bfloat16"
    ]


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("model.layers.0.self_attn.q_norm.weight", "its 'qk_rms_gamma' is not true"),
        ("model.yoco_k_norm.weight", "its 'qk_rms_gamma' is not true"),
        ("emb_proj_in.weight", "the embeddings are projected"),
        ("model.emb_out_norm.weight", "the embeddings are projected"),
        ("layers.0.self_attn.q_proj.weight_clip_val", "it quantizes activations and weights"),
        ("model.layers.0.mlp.w13_act_scale", "it quantizes activations and weights"),
        ("language_model.model.norm.weight", "the model reads images"),
        ("vision_tower.patch_embed.weight", "the model reads images"),
    ],
)
def test_tensors_of_what_is_not_computed_here_are_refused_by_name(name, complaint, tmp_path):
    save_changed(tmp_path, keys=dict(qk_rms_clip=True), tensors={name: torch.ones(16)})
    with pytest.raises(ValueError, match=re.escape(f"the source has {name}")) as refused:
        planned(tmp_path, tmp_path / "converted")
    assert complaint in str(refused.value)
