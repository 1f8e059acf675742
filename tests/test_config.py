"""What a config.json says is what is loaded, overridden, saved and hashed."""

import json
import logging

import pytest
import transformers
from harness import tiny
from transformers import AutoConfig
from vllm.config import ModelConfig
from vllm.config.utils import normalize_value
from vllm.plugins import load_general_plugins

from vllm_yocou.architecture import SWITCHES
from vllm_yocou.config import YocoUConfig


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
def test_iterations_that_were_not_trained_warn_once(tmp_path, caplog, how):
    depth = {"update": 7, "from_pretrained": 8}[how]  # the warning is once per text and process
    tiny.config(num_iterations=3).save_pretrained(tmp_path)
    assert "trained_iterations" not in json.loads((tmp_path / "config.json").read_text())
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            if how == "update":
                cfg = YocoUConfig.from_pretrained(tmp_path)
                cfg.update({"num_iterations": depth})
            else:
                cfg = YocoUConfig.from_pretrained(tmp_path, num_iterations=depth)
    assert (cfg.num_iterations, cfg.trained_iterations) == (depth, [3])
    warnings = [record.getMessage() for record in caplog.records if "num_iterations" in record.getMessage()]
    assert len(warnings) == 1
    assert f"num_iterations is {depth}: the checkpoint was trained with 3, other depths" in warnings[0]
    # A checkpoint that is saved with another T is no better trained.
    cfg.save_pretrained(tmp_path)
    assert YocoUConfig.from_pretrained(tmp_path).trained_iterations == [3]


def test_iterations_that_were_trained_do_not_warn(tmp_path, caplog):
    tiny.config(num_iterations=5, trained_iterations=[2, 5, 6]).save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        for depth in (2, 6):
            YocoUConfig.from_pretrained(tmp_path, num_iterations=depth)
        assert "num_iterations" not in caplog.text
        YocoUConfig.from_pretrained(tmp_path, num_iterations=3)
    assert "num_iterations is 3: the checkpoint was trained with 2, 5, 6, other depths" in caplog.text


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
        for change in ({"num_iterations": 1}, {"trained_iterations": [1, 3]}, {"sliding_window": 17})
    )
    assert one == three != other
