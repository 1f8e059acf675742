"""Settings that cannot be right with YOCO-U are refused in one sentence before an engine starts."""

import pytest
import tiny
from vllm.engine.arg_utils import EngineArgs

REFUSED = [
    (dict(pipeline_parallel_size=2), "Pipeline parallelism is not supported for this model"),
    (dict(tensor_parallel_size=4, decode_context_parallel_size=2), "context parallelism cannot be used with YOCO-U"),
    (dict(kv_sharing_fast_prefill=True), "--kv-sharing-fast-prefill cannot be used with YOCO-U"),
    (dict(disable_sliding_window=True), "--disable-sliding-window cannot be used with YOCO-U"),
    (dict(hf_overrides={"num_iterations": 0}), "num_iterations is 0: it must be a whole number of at least 1"),
    (dict(hf_overrides={"sliding_window": "wide"}), "sliding_window is 'wide': it must be a whole number"),
    (dict(hf_overrides={"diff_attention": True}), "config key 'diff_attention' is True"),
    (dict(tensor_parallel_size=3), "num_attention_heads 4 is not divisible by the tensor parallel size 3"),
    (
        dict(tensor_parallel_size=4, hf_overrides={"cross_num_attention_heads": 6}),
        "cross_num_attention_heads 6 is not divisible by the tensor parallel size 4",
    ),
    (
        dict(tensor_parallel_size=2, hf_overrides={"cross_num_attention_heads": 6, "cross_num_key_value_heads": 3}),
        "cross_num_key_value_heads 3 can be neither split over nor replicated on 2 tensor parallel ranks",
    ),
    (
        dict(tensor_parallel_size=2, hf_overrides={"intermediate_size": 161}),
        "intermediate_size 161 is not divisible by the tensor parallel size 2",
    ),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model(tiny.config()).save_pretrained(folder)
    return str(folder)


def configured(checkpoint: str, **settings):
    return EngineArgs(model=checkpoint, skip_tokenizer_init=True, dtype="float32", **settings).create_engine_config()


@pytest.mark.parametrize("settings, sentence", REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_refused(checkpoint, settings, sentence):
    with pytest.raises((ValueError, NotImplementedError), match=sentence):
        configured(checkpoint, **settings)


def test_a_draft_model_is_refused(checkpoint):
    draft = {"method": "draft_model", "model": checkpoint, "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match="by 'draft_model' cannot be used with YOCO-U: .* use 'ngram'"):
        configured(checkpoint, speculative_config=draft)


def test_overrides_by_a_function_are_checked_too(checkpoint):
    def override(config):
        config.num_iterations = -1
        return config

    with pytest.raises(ValueError, match="num_iterations is -1"):
        configured(checkpoint, hf_overrides=override)


def test_mixtures_of_experts_are_refused_for_now(tmp_path):
    tiny.moe_config(architectures=["YocoUForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_experts is 5: mixtures of experts are not served yet"):
        configured(str(tmp_path))


def test_the_window_stays_with_the_layers_that_have_one(checkpoint):
    """A model-wide window would be inherited by the global cache."""
    assert configured(checkpoint).cache_config.sliding_window is None
