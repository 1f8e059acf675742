"""The authors' keys are read as their code reads them, absent ones included; none is ignored."""

import re

import pytest
import torch
from harness import foreign_sources as sources
from harness.conversions import planned, save_changed

FAMILY = sources.AUTHORS_FAMILY
V3, V2 = FAMILY["moe-v3-latent"], FAMILY["dense-v2-clip"]


def read(folder, config, keys=(), **changes):
    save_changed(folder, config=config, keys=keys, **changes)
    return planned(folder, folder / "converted")


@pytest.mark.parametrize("name", FAMILY)
def test_both_spellings_say_the_same(name, tmp_path):
    plans = []
    for form, config in (("trainer", FAMILY[name]), ("hugging-face", sources.respelled(FAMILY[name]))):
        (tmp_path / form).mkdir()
        sources.save_authors(tmp_path / form, config, sources.authors_weights(FAMILY[name]))
        plans.append(planned(tmp_path / form, tmp_path / "converted"))
    assert plans[0].config.to_dict() == plans[1].config.to_dict()


def test_the_first_spelling_is_used_where_two_differ(tmp_path):
    plan = read(tmp_path, sources.AUTHORS, dict(rms_norm_eps=1e-4))
    assert plan.config.rms_norm_eps == 1e-4
    assert plan.notes == [
        "the source's 'rms_norm_eps' is 0.0001 and its 'norm_eps' is 1e-05: the first is used, as in the authors' code."
    ]


# An absent key, and what it means to their code.
@pytest.mark.parametrize(
    "absent, ours, value, noted",
    [
        ("swiglu_limit", "swiglu_limit", 10.0, True),
        ("universal_loop", "num_iterations", 1, True),
        ("yoco_window_size", "sliding_window", 513, True),
        ("norm_eps", "rms_norm_eps", 1e-6, True),
        ("rope_theta", "rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}, True),
        ("logit_scale", "logit_scale", 1.0, False),
        ("cross_head_dim", "cross_head_dim", 16, False),
        ("weight_tying", "tie_word_embeddings", False, False),
    ],
)
def test_an_absent_key_has_the_default_of_their_code(absent, ours, value, noted, tmp_path):
    plan = read(tmp_path, sources.AUTHORS, {absent: None})
    assert getattr(plan.config, ours) == value
    assert bool(plan.notes) == noted


def test_heads_of_the_cross_decoder_are_by_default_the_self_decoders(tmp_path):
    config = sources.AUTHORS | dict(cross_head=4, cross_kv_head=2)
    plan = read(tmp_path, config, dict(cross_head=None, cross_kv_head=None))
    assert (plan.config.cross_num_attention_heads, plan.config.cross_num_key_value_heads) == (4, 2)


@pytest.mark.parametrize("limit", [0, -1.0])
def test_a_limit_of_zero_or_less_is_none(limit, tmp_path):
    assert read(tmp_path, sources.AUTHORS, dict(swiglu_limit=limit)).config.swiglu_limit is None


@pytest.mark.parametrize(
    "keys, weights, kind",
    [
        (dict(diff_v3=True, diff_v2=True, diff_attention=True), V3, "v3"),
        (dict(diff_v3=False, diff_v2=True, diff_attention=False), V2, "v2"),
        (dict(diff_v3=False, diff_v2=None, diff_attention=True), V2, "v2"),
        (dict(diff_v3=None, diff_v2=None, diff_attention=None), V2, "v2"),
        (dict(diff_v3=False, diff_v2=None, diff_attention=None), V2, "v2"),
        (dict(diff_v3=False, diff_v2=False, diff_attention=True), sources.AUTHORS, "none"),
        (dict(diff_v3=False, diff_v2=None, diff_attention=False), sources.AUTHORS, "none"),
    ],
)
def test_differential_attention_by_the_first_key_that_is_there(keys, weights, kind, tmp_path):
    plan = read(tmp_path, weights, keys)
    assert plan.config.differential_attention == kind
    undeclared = not keys["diff_v3"] and keys["diff_v2"] is None and keys["diff_attention"] is None
    assert any("differential attention (v2) is used" in note for note in plan.notes) == undeclared


@pytest.mark.parametrize("config", [sources.AUTHORS, sources.AUTHORS | dict(diff_v3=True)], ids=["none", "v3"])
@pytest.mark.parametrize("v3", [None, False])
def test_shapes_contradict_absent_keys_of_differential_attention(config, v3, tmp_path):
    with pytest.raises(
        ValueError, match=r"which means differential attention \(v2\) to the authors' code, and model\."
    ):
        read(tmp_path, config, dict(diff_v3=v3, diff_v2=None, diff_attention=None))


@pytest.mark.parametrize("self_only, norms, notes", [(True, "self", 0), (False, "all", 0), (None, "all", 1)])
def test_the_norms_scope_is_what_is_written_or_both_decoders_with_a_note(self_only, norms, notes, tmp_path):
    plan = read(tmp_path, sources.AUTHORS, dict(qk_norm=True, qk_norm_self_only=self_only))
    assert (plan.config.qk_norm, plan.config.qk_clip_limit, len(plan.notes)) == (norms, None, notes)


def test_the_clip_is_in_both_decoders_and_wins_over_the_norm(tmp_path):
    plan = read(tmp_path, sources.AUTHORS, dict(qk_norm=True, qk_norm_self_only=True, qk_rms_clip=True))
    assert (plan.config.qk_norm, plan.config.qk_clip_limit) == ("all", 3.0)


def test_norms_without_weights_get_ones(tmp_path):
    plan = read(tmp_path, sources.AUTHORS, dict(qk_rms_clip=True))
    made = {step.target: step.tensor.read() for step in plan.steps if step.source == "ones"}
    assert len(made) == 2 * 3 + 1 + 2 and all(torch.equal(tensor, torch.ones(16)) for tensor in made.values())


@pytest.mark.parametrize("head", [True, False])
def test_a_head_that_the_trainer_tied_and_the_export_does_not(head, tmp_path):
    """Their serving code reads tie_word_embeddings alone: where there is a head it is used."""
    plan = read(tmp_path, sources.AUTHORS, dict(weight_tying=True), tensors={} if head else {"lm_head.weight": None})
    assert plan.config.tie_word_embeddings is not head


def test_a_head_that_is_not_the_embeddings_contradicts_tied_ones(tmp_path):
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from its model\.embed_tokens\.weight, and the conf"):
        read(tmp_path, sources.AUTHORS, dict(tie_word_embeddings=True))


def test_keys_that_change_nothing_are_read(tmp_path):
    off = dict(quant_mode="bfloat16", quant_block_size=128, bit_linear="off", moe_expert_bit_linear=False, mtp_n=2)
    off |= dict(embproj=False, emb_proj_norm=False, embedding_dim=48, gated_attention=False, unk_token_id=3)
    off |= dict(hidden_size=48, num_iterations=3, attention_bias=False, headwise_glu=False, logit_scale=1.0)
    assert read(tmp_path, sources.AUTHORS, off).notes == []


@pytest.mark.parametrize(
    "keys, complaint",
    [
        (dict(embproj=True), "'embproj' is True: the embeddings are projected"),
        (dict(emb_proj_norm=True), "'emb_proj_norm' is True: the embeddings are projected"),
        (dict(embedding_dim=24), "'embedding_dim' is 24: the embeddings are projected"),
        (dict(quant_mode="ternary"), "'quant_mode' is 'ternary': it quantizes activations and weights"),
        (dict(bit_linear="all"), "'bit_linear' is 'all': it quantizes"),
        (dict(moe_expert_bit_linear=True), "'moe_expert_bit_linear' is True: it quantizes"),
        (dict(gated_attention=True), "'gated_attention' is True: it is not known whether"),
        (dict(yoco_cross_layers=0), "'yoco_cross_layers' is 0: without a cross-decoder"),
        (dict(yoco_cross_layers=None), "'yoco_cross_layers' is None: without a cross-decoder"),
        (dict(yoco_cross_layers=5), "num_self_decoder_layers is 0"),
        (dict(yoco_cross_layers="two"), "'yoco_cross_layers' is 'two': it must be a whole number"),
        (dict(yoco_window_size=0), "'yoco_window_size' is 0: it must be a whole number of at least 1"),
        (
            dict(cross_head_dim=8, head_dim=None, d_model=64),
            "'cross_head_dim' is 8: the authors' code takes head_dim, 16",
        ),
        (dict(cross_head_dim=8), "'cross_head_dim' is 8: the authors' code takes head_dim, 16, in both decoders"),
        (dict(new_trick=3, other=False), "'new_trick' (3), 'other' (False), and what that changes"),
        (dict(rope_scaling={"factor": 2}), "'rope_scaling' ({'factor': 2}), and what that changes"),
        (dict(mlp_bias=True), "'mlp_bias' is True"),
        (dict(qk_rms_clip=4.0), "'qk_rms_clip' is 4.0: it must be true or false"),
        (dict(swiglu_limit="ten"), "'swiglu_limit' is 'ten': it must be a number"),
        (dict(swiglu_limit=float("nan")), "swiglu_limit is nan"),
        (dict(d_model=None), "'hidden_size' or 'd_model' is missing"),
        (dict(max_seq_len=None), "give --context"),
        (dict(max_seq_len=-1), "give --context"),
        (dict(n_layers=None), "'num_hidden_layers' is None: it must be a whole number of at least 1"),
        (dict(universal_loop=0), "num_iterations is 0"),
        (dict(moe_expert_num=4, moe_top_k=2, moe_ffn_dim=24), "'shared_expert_intermediate_size' or 'd_shared_expert'"),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(keys, complaint, tmp_path):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        read(tmp_path, sources.AUTHORS, keys)
