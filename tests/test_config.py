"""Every impossible value is refused with its name, its value and a remedy, however it arrives."""

import dataclasses
import json
import logging
import subprocess
import sys

import pytest
import torch
import transformers
from harness import tiny
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import AutoConfig, PreTrainedConfig
from vllm.config import ModelConfig
from vllm.config.utils import normalize_value
from vllm.plugins import load_general_plugins

from vllm_yocou.architecture import REQUIRED, SWITCHES, TOKEN_IDS, Architecture
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


@pytest.mark.parametrize("spelling", [dict(rope_theta=500.0), dict(rope_parameters={"rope_theta": 500.0})])
def test_both_spellings_of_rope_theta(tmp_path, spelling):
    cfg = tiny.config(**spelling)
    assert cfg.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"}
    cfg.update({"rope_theta": 700.0})
    assert cfg.rope_parameters["rope_theta"] == 700.0
    cfg.save_pretrained(tmp_path)
    assert YocoUConfig.from_pretrained(tmp_path).rope_parameters == cfg.rope_parameters


def test_saved_config_names_every_key(tmp_path):
    cfg = tiny.moe_config()
    cfg.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "yoco_u"
    for key in ("num_self_decoder_layers", "cross_head_dim", "qk_norm", "num_iterations", "rope_parameters"):
        assert saved[key] == getattr(cfg, key)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is YocoUConfig
    assert loaded.to_diff_dict() == cfg.to_diff_dict()


WRITTEN_BY_0_2 = """\
{
  "auto_map": {
    "AutoConfig": "yoco_u.YocoUConfig",
    "AutoModel": "yoco_u.YocoUModel",
    "AutoModelForCausalLM": "yoco_u.YocoUForCausalLM"
  },
  "bos_token_id": null,
  "cross_decoder_rope": false,
  "cross_head_dim": 32,
  "cross_num_attention_heads": 4,
  "cross_num_key_value_heads": 2,
  "embedding_multiplier": 1.0,
  "eos_token_id": null,
  "head_dim": 32,
  "hidden_act": "silu",
  "hidden_size": 96,
  "initializer_range": 0.02,
  "intermediate_size": 160,
  "max_position_embeddings": 1024,
  "model_type": "yoco_u",
  "moe_intermediate_size": null,
  "norm_topk_prob": true,
  "num_attention_heads": 4,
  "num_experts": null,
  "num_experts_per_tok": null,
  "num_hidden_layers": 4,
  "num_iterations": 3,
  "num_key_value_heads": 2,
  "num_self_decoder_layers": 2,
  "pad_token_id": null,
  "qk_norm": "none",
  "rms_norm_eps": 1e-06,
  "rope_interleaved": false,
  "rope_parameters": {
    "rope_theta": 10000.0,
    "rope_type": "default"
  },
  "shared_expert_gate": null,
  "shared_expert_intermediate_size": null,
  "sliding_window": 16,
  "tie_word_embeddings": false,
  "transformers_version": "{version}",
  "use_cache": true,
  "vocab_size": 211
}
"""
WITH_EXPERTS = {
    '"moe_intermediate_size": null': '"moe_intermediate_size": 48',
    '"num_experts": null': '"num_experts": 5',
    '"num_experts_per_tok": null': '"num_experts_per_tok": 2',
    '"shared_expert_intermediate_size": null': '"shared_expert_intermediate_size": 64',
}


def test_a_config_without_the_authors_switches_is_saved_as_older_versions_saved_it(tmp_path):
    dense = WRITTEN_BY_0_2.replace("{version}", transformers.__version__)
    tiny.config().save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == dense
    with_experts = dense
    for old, new in WITH_EXPERTS.items():
        with_experts = with_experts.replace(old, new)
    tiny.moe_config().save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == with_experts


def test_a_saved_config_names_the_authors_switches_that_are_on(tmp_path):
    for cfg in tiny.AUTHORS.values():
        cfg.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        changed = {key: getattr(cfg, key) for key in SWITCHES if getattr(cfg, key) != getattr(YocoUConfig, key)}
        assert {key: value for key, value in saved.items() if key in SWITCHES} == changed != {}
        assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == cfg.to_diff_dict()


def test_a_switch_overridden_to_off_is_off(tmp_path):
    tiny.config(swiglu_limit=10.0, logit_scale=0.5).save_pretrained(tmp_path)
    cfg = YocoUConfig.from_pretrained(tmp_path, swiglu_limit=None)
    cfg.update({"logit_scale": 1.0})
    assert (cfg.swiglu_limit, cfg.logit_scale) == (None, 1.0)
    assert not {*SWITCHES} & {*cfg.to_diff_dict()}


@pytest.mark.parametrize("how", ["update", "from_pretrained"])
def test_overriding_the_iterations_warns_once_with_the_trained_depth(tmp_path, caplog, how):
    depth = {"update": 7, "from_pretrained": 8}[how]  # the warning is once per text and process
    tiny.config(num_iterations=3).save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            if how == "update":
                cfg = YocoUConfig.from_pretrained(tmp_path)
                cfg.update({"num_iterations": depth})
            else:
                cfg = YocoUConfig.from_pretrained(tmp_path, num_iterations=depth)
    assert cfg.num_iterations == depth
    warnings = [record.getMessage() for record in caplog.records if "num_iterations" in record.getMessage()]
    assert len(warnings) == 1
    assert f"overridden to {depth}: the checkpoint was trained with 3" in warnings[0]


@pytest.mark.parametrize("key", ["num_iteration", "uuid"])
def test_an_override_of_what_is_not_a_key_is_refused(key):
    with pytest.raises(ValueError, match=f"config key '{key}' is unknown to YOCO-U: correct the name"):
        tiny.config().update({key: 2})


def test_what_a_saved_config_says_overrides_one_that_was_never_saved(tmp_path):
    tiny.config(sliding_window=17).save_pretrained(tmp_path)
    cfg = tiny.config()
    cfg.update(YocoUConfig.from_pretrained(tmp_path).to_dict())
    assert cfg.sliding_window == 17


def model_config(folder, overrides: dict) -> ModelConfig:
    """vLLM's, of the checkpoint in `folder`."""
    load_general_plugins()
    return ModelConfig(str(folder), hf_overrides=overrides, skip_tokenizer_init=True)


def overridden(how: str, folder, overrides: dict) -> YocoUConfig:
    """Of LLAMA3_ROPE, by each way that there is."""
    tiny.config(rope_parameters=tiny.LLAMA3_ROPE, architectures=["YocoUForCausalLM"]).save_pretrained(folder)
    if how == "vllm":
        return model_config(folder, overrides).hf_config
    if how == "from_pretrained":
        return YocoUConfig.from_pretrained(folder, **overrides)
    cfg = YocoUConfig.from_pretrained(folder)
    cfg.update(overrides)
    return cfg


@pytest.mark.parametrize("how", ["update", "from_pretrained", "vllm"])
def test_a_rope_override_of_another_type_leaves_nothing_of_the_old(how, tmp_path):
    for overrides, expected in (
        ({"rope_theta": 500.0}, tiny.LLAMA3_ROPE | {"rope_theta": 500.0}),
        ({"rope_parameters": {"factor": 4.0}}, tiny.LLAMA3_ROPE | {"factor": 4.0}),
        ({"rope_parameters": {"rope_type": "default"}}, {"rope_type": "default", "rope_theta": 1e4}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2}},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2},
        ),
    ):
        assert overridden(how, tmp_path, overrides).rope_parameters == expected
    for overrides, complaint in (
        (
            {"rope_parameters": {"rope_type": "default", "factor": 8.0}},
            "rope_parameters has 'factor': RoPE of type default",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            overridden(how, tmp_path, overrides)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_a_rope_override_wins(spelling):
    cfg = tiny.config(rope_theta=500.0)
    cfg.update({spelling: {"rope_type": "yoco2024"}})
    assert cfg.rope_parameters == {"rope_theta": 500.0, "rope_type": "yoco2024"}


def test_impossible_values_are_refused_on_saving(tmp_path):
    cfg = tiny.config()
    cfg.sliding_window = 0
    with pytest.raises(ValueError, match="sliding_window is 0: it must be a whole number of at least 1"):
        cfg.save_pretrained(tmp_path)


def test_impossible_overrides_are_refused_on_loading(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_iterations is 0"):
        YocoUConfig.from_pretrained(tmp_path, num_iterations=0)


def test_vllm_keys_compiled_code_by_everything_but_the_iterations(tmp_path):
    keys = [normalize_value(tiny.config(num_iterations=iterations)) for iterations in (1, 3)]
    assert keys[0] == keys[1] == normalize_value(tiny.config())
    assert normalize_value(tiny.config(sliding_window=17)) not in keys
    tiny.config().save_pretrained(tmp_path)
    assert normalize_value(YocoUConfig.from_pretrained(tmp_path)) == keys[0]


def test_vllm_hashes_a_checkpoint_alike_with_every_number_of_iterations(tmp_path):
    tiny.config(architectures=["YocoUForCausalLM"]).save_pretrained(tmp_path)
    one, three, other = (
        model_config(tmp_path, change).compute_hash()
        for change in ({"num_iterations": 1}, {"num_iterations": 3}, {"sliding_window": 17})
    )
    assert one == three != other


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
