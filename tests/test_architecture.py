"""Every impossible value is refused with its name, its value and a remedy, however it arrives."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from harness import tiny
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import PreTrainedConfig

from vllm_yocou.architecture import REQUIRED, TOKEN_IDS, Architecture
from vllm_yocou.checkpoints.format import expected_shapes
from vllm_yocou.config import YocoUConfig
from vllm_yocou.config_keys import CONVERTED_SWITCHES, FOREIGN_SWITCHES, KEYS

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
IMPOSSIBLE = (
    [
        (dict(num_iterations=0), "num_iterations is 0: it must be a whole number of at least 1"),
        (dict(num_iterations=2.5), "num_iterations is 2.5: it must be a whole number"),
        (dict(num_iterations="3"), "num_iterations is '3': it must be a whole number"),
        (dict(num_iterations=True), "num_iterations is True: it must be a whole number"),
        (dict(num_iterations=10**6), "num_iterations is 1000000: no model has so many, it must be at most 4096"),
        (dict(trained_iterations=3), "trained_iterations is 3: it must be a list of whole numbers between 1 and 4096"),
        (dict(trained_iterations=[]), "trained_iterations is \\[\\]: it must be a list of whole numbers"),
        (dict(trained_iterations=[1, 0]), "trained_iterations is \\[1, 0\\]: it must be a list of whole numbers"),
        (dict(trained_iterations=[1, 2.5]), "trained_iterations is \\[1, 2.5\\]: it must be a list of whole numbers"),
        (dict(vocab_size=2**31), "vocab_size is 2147483648: no model has so many, it must be at most 2147483647"),
        (dict(sliding_window=0), "sliding_window is 0: it must be a whole number of at least 1"),
        (dict(sliding_window=None), "sliding_window is None: it must be a whole number of at least 1"),
        (dict(vocab_size=-5), "vocab_size is -5"),
        (dict(num_self_decoder_layers=0), "num_self_decoder_layers is 0"),
        (
            dict(num_self_decoder_layers=4),
            "num_self_decoder_layers is 4 of num_hidden_layers 4: choose it between 1 and 3",
        ),
        (dict(num_key_value_heads=3), "num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        (
            dict(cross_num_key_value_heads=3),
            "cross_num_attention_heads 4 is not divisible by cross_num_key_value_heads 3",
        ),
        (dict(head_dim=33), "head_dim is 33: RoPE rotates pairs, choose an even size"),
        (dict(cross_head_dim=33, cross_decoder_rope=True), "cross_head_dim is 33: RoPE rotates pairs"),
        (dict(qk_norm="q"), "qk_norm is 'q': choose one of none, self, all"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu': .* set 'silu'"),
        (dict(rms_norm_eps=0), "rms_norm_eps is 0: it must be a positive number"),
        (dict(embedding_multiplier=float("inf")), "embedding_multiplier is inf"),
        (dict(embedding_multiplier=10**400), "embedding_multiplier is 1000.*: it must be a positive number of at most"),
        (dict(initializer_range="small"), "initializer_range is 'small': it must be a number between 0 and"),
        (dict(shared_expert_gate=1), "shared_expert_gate is 1: set true or false, or leave it out"),
        (dict(use_cache="no"), "use_cache is 'no': it must be true or false"),
        (dict(rope_interleaved="yes"), "rope_interleaved is 'yes': it must be true or false"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope_type is 'yarn': YOCO-U knows"),
        (dict(rope_parameters={"factor": 4.0}), "rope_parameters has 'factor'"),
        (dict(rope_parameters=["linear"]), "rope_parameters is \\['linear'\\]: give a mapping"),
        (dict(rope_parameters={"rope_type": ["linear"]}), "rope_type is \\['linear'\\]: YOCO-U knows"),
        (dict(rope_parameters={"rope_type": "linear"}), "rope_parameters has factor None: RoPE of type linear needs"),
        (dict(rope_parameters={"rope_type": "linear", "factor": 0.5}), "rope_parameters has factor 0.5"),
        (
            dict(rope_parameters=tiny.LLAMA3_ROPE | {"low_freq_factor": 4}),
            "low_freq_factor is 4 and high_freq_factor 4.0",
        ),
        (dict(rope_theta=-1.0), "rope_theta is -1.0: it must be a number between 1 and 1e\\+30"),
        (dict(differential_attention="v1"), "differential_attention is 'v1': choose one of none, v2, v3"),
        (dict(differential_attention=None), "differential_attention is None: choose one of none, v2, v3"),
        (dict(headwise_glu=1), "headwise_glu is 1: it must be true or false"),
        (dict(attention_bias="q"), "attention_bias is 'q': it must be true or false"),
        (dict(qk_norm="all", qk_clip_limit=0), "qk_clip_limit is 0: it must be a positive number"),
        (dict(swiglu_limit=-1.0), "swiglu_limit is -1.0: it must be a positive number"),
        (dict(first_k_dense_replace=-1), "first_k_dense_replace is -1: it must be a whole number of at least 0"),
        (EXPERTS | dict(first_k_dense_replace=None), "first_k_dense_replace is None: it must be a whole number"),
        (EXPERTS | dict(router_in_fp32="yes"), "router_in_fp32 is 'yes': it must be true or false"),
        (EXPERTS | dict(moe_latent_size=0), "moe_latent_size is 0: it must be a whole number of at least 1"),
        (EXPERTS | dict(moe_latent_size=8, moe_latent_norm=None), "moe_latent_norm is None: it must be true or false"),
        (dict(residual_in_fp32="float32"), "residual_in_fp32 is 'float32': it must be true or false"),
        (dict(logit_scale=0), "logit_scale is 0: it must be a positive number"),
        (
            dict(headwise_glu=True, differential_attention="v2"),
            "headwise_glu is true with differential_attention 'v2', whose gates take its place: choose one",
        ),
        (dict(qk_clip_limit=3.0), "qk_clip_limit is 3.0 with qk_norm 'none': .* set qk_norm to 'self' or 'all'"),
        (EXPERTS | dict(first_k_dense_replace=4), "first_k_dense_replace is 4 of num_hidden_layers 4: .* choose fewer"),
        (
            dict(first_k_dense_replace=1),
            "first_k_dense_replace is 1 without num_experts, .*: a dense model has no experts",
        ),
        (dict(router_in_fp32=True), "router_in_fp32 is True without num_experts, .* remove it or give all of them"),
        (dict(moe_latent_size=8), "moe_latent_size is 8 without num_experts, .* remove it or give all of them"),
        (EXPERTS | dict(moe_latent_norm=True), "moe_latent_norm is true without moe_latent_size: .* remove it"),
        (dict(num_experts=8), "num_experts given without num_experts_per_tok, moe_intermediate_size"),
        (
            dict(num_experts=4, num_experts_per_tok=5, moe_intermediate_size=8),
            "num_experts_per_tok is 5 of num_experts 4",
        ),
        (dict(shared_expert_intermediate_size=8), "shared_expert_intermediate_size is 8 without num_experts"),
        (dict(shared_expert_gate=True), "shared_expert_gate is True without shared_expert_intermediate_size"),
        (
            dict(layer_types=["full_attention"] * 4),
            "config key 'layer_types' is .* it follows from the other keys, remove it",
        ),
        (dict(num_cross_decoder_layers=2), "config key 'num_cross_decoder_layers' is 2"),
        (dict(rope_parameters="default"), "rope_parameters is 'default': give a mapping"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_type is 'yarn'"),
        (dict(pad_token_id=211), "pad_token_id is 211: a token id must be between 0 and 210"),
        (dict(pad_token_id=[0]), "pad_token_id is .*: a token id must be between 0 and 210"),
        (dict(eos_token_id=[]), "eos_token_id is .*: a token id must be between 0 and 210"),
        (dict(eos_token_id=True), "eos_token_id is True: a token id must be between 0 and 210"),
        (dict(eos_token_id=[0, -1]), "eos_token_id is .*: a token id must be between 0 and 210"),
        (dict(d_model=64), "config key 'd_model' is 64: it belongs to another YOCO schema"),
        (dict(universal_loop=3), "config key 'universal_loop' is 3: it belongs to another YOCO schema, convert"),
        (dict(n_self_heads=3), "config key 'n_self_heads' is 3: .* convert the checkpoint"),
    ]
    + [
        (dict([(switch, True)]), f"config key '{switch}' is True: .* use a checkpoint trained without it")
        for switch in FOREIGN_SWITCHES
    ]
    + [
        (dict([(switch, True)]), f"config key '{switch}' is True: .* convert the checkpoint")
        for switch in CONVERTED_SWITCHES
    ]
)
NAMES = [" ".join(f"{key}={value}" for key, value in overrides.items()) for overrides, _ in IMPOSSIBLE]


@pytest.mark.parametrize("overrides, message", IMPOSSIBLE, ids=NAMES)
def test_impossible_values_are_refused_on_construction(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**overrides)


@pytest.mark.parametrize("overrides, message", IMPOSSIBLE, ids=NAMES)
def test_impossible_values_are_refused_without_transformers(overrides, message):
    """`vllm-yocou kv` reads a config.json by `Architecture` alone."""
    keys = tiny.config().to_dict()
    del keys["rope_parameters"]  # it would win over a plain rope_theta
    assert Architecture.of(keys).rope_parameters == tiny.config().rope_parameters
    with pytest.raises(ValueError, match=message):
        Architecture.of(keys | overrides)


@pytest.mark.parametrize("overrides, message", IMPOSSIBLE, ids=NAMES)
def test_impossible_values_are_refused_as_overrides(overrides, message):
    """`update` is what vLLM calls with --hf-overrides."""
    with pytest.raises(ValueError, match=message):
        tiny.config().update(overrides)


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_sizes_are_refused(key):
    with pytest.raises(ValueError, match=f"config key '{key}' is missing"):
        tiny.config(**{key: None})


def test_one_layer_is_refused():
    with pytest.raises(ValueError, match="num_self_decoder_layers"):
        tiny.config(num_hidden_layers=1, num_self_decoder_layers=None)


def test_head_size_must_be_given_where_it_cannot_be_derived():
    with pytest.raises(ValueError, match="hidden_size 96 is not divisible by num_attention_heads 7"):
        tiny.config(num_attention_heads=7, num_key_value_heads=7, head_dim=None)


def test_defaults_are_the_formats():
    cfg = YocoUConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    assert (cfg.num_self_decoder_layers, cfg.num_cross_decoder_layers) == (2, 3)
    assert (cfg.num_iterations, cfg.sliding_window, cfg.rms_norm_eps) == (3, 512, 1e-6)
    assert (cfg.num_key_value_heads, cfg.head_dim) == (4, 16)
    assert (cfg.cross_num_attention_heads, cfg.cross_num_key_value_heads, cfg.cross_head_dim) == (4, 4, 16)
    assert cfg.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert (cfg.rope_interleaved, cfg.cross_decoder_rope, cfg.tie_word_embeddings) == (False, False, False)
    assert (cfg.qk_norm, cfg.embedding_multiplier, cfg.norm_topk_prob, cfg.is_moe) == ("none", 1.0, True, False)
    assert cfg.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 3


def test_harmless_switches_pass():
    assert tiny.config(attention_bias=False, qk_rms_clip=None).num_iterations == 3


OWN_KEYS = {field.name for field in dataclasses.fields(YocoUConfig)} - {
    field.name for field in dataclasses.fields(PreTrainedConfig)
}
SPELLINGS = sorted(OWN_KEYS | {"rope_theta", "rope_scaling"})


def test_every_key_has_a_rule():
    assert {*KEYS, *TOKEN_IDS, "rope_parameters"} == OWN_KEYS


def test_an_architecture_is_what_the_config_says(tmp_path):
    for cfg in (tiny.CONFIGS | tiny.AUTHORS).values():
        cfg.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        found = Architecture.of(saved)
        assert dataclasses.asdict(found) == {key: getattr(cfg, key) for key in OWN_KEYS}
        assert (found.layer_types, found.is_moe) == (cfg.layer_types, cfg.is_moe)


def test_reading_a_config_imports_neither_torch_nor_transformers():
    code = "import sys, vllm_yocou.architecture; print({'torch', 'transformers', 'vllm'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


SCALARS = some.one_of(
    some.none(),
    some.booleans(),
    some.integers(-2, 9),
    some.sampled_from([16, 96, 2**12, 2**31, 10**12, 10**400]),
    some.floats(),
    some.text(max_size=5),
    some.sampled_from(["silu", "none", "self", "all", "v2", "v3", "default", "yoco2024", "3", "nan"]),
)
ANYTHING = some.one_of(
    SCALARS,
    some.lists(SCALARS, max_size=3),
    some.dictionaries(some.sampled_from(["rope_theta", "rope_type", "type", "factor"]), SCALARS, max_size=3),
)
# Half of the values are such that some key may have them, or most models would be refused.
SANE = some.sampled_from(
    [1, 2, 4, 8, 12, 16, 96, 160, 0.5, 1.0, 1e-6, 500.0, True, False, None, "self", "all", "none", "v3"]
)
VALUES = some.booleans().flatmap(lambda sane: SANE if sane else ANYTHING)
RUNNABLE = 2**22  # parameters times iterations of a model that a test can afford


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    some.dictionaries(some.sampled_from(SPELLINGS), VALUES, min_size=1, max_size=3), some.booleans(), some.booleans()
)
def test_any_values_are_refused_in_a_sentence_or_make_a_model(overrides, moe, late):
    make = tiny.moe_config if moe else tiny.config
    try:
        if late:
            cfg = make()
            cfg.update(overrides)
        else:
            cfg = make(**overrides)
    except ValueError as refusal:
        (sentence,) = str(refusal).splitlines()
        parts = [*overrides, *(key for value in overrides.values() if isinstance(value, dict) for key in value)]
        assert any(key in sentence for key in parts), sentence
        assert sentence.endswith(".")
        assert ": " in sentence
        return
    shapes = expected_shapes(cfg).values()
    if sum(torch.Size(shape).numel() for shape in shapes) * cfg.num_iterations > RUNNABLE:
        return
    logits = tiny.model(cfg)(torch.tensor([[0, cfg.vocab_size - 1, cfg.vocab_size // 2]])).logits
    assert logits.shape == (1, 3, cfg.vocab_size)
    assert logits.isfinite().all()
