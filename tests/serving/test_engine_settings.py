"""Settings that cannot be right with YOCO-U are refused in one sentence before an engine starts."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from harness import tiny
from harness.checkout import needs_compiler
from torch._inductor import config as inductor
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext

from vllm_yocou.rows import v1_runner
from vllm_yocou.serving.capacity import CHUNK_ON_CPU, CHUNK_ON_GPU
from vllm_yocou.serving.chunk import longest_chunk
from vllm_yocou.serving.engine_settings import NAMELESS, check_lora, check_speculation, choose_clamping_experts

REFUSED = [
    (dict(enable_return_routed_experts=True), "--enable-return-routed-experts cannot be used with YOCO-U"),
    (dict(pipeline_parallel_size=2), "Pipeline parallelism is not supported for this model"),
    (dict(tensor_parallel_size=4, decode_context_parallel_size=2), "context parallelism cannot be used with YOCO-U"),
    (dict(compilation_config={"mode": 1}), "compilation mode 1 cannot be used with YOCO-U: it would unroll the loop"),
    (dict(kv_sharing_fast_prefill=True), "--kv-sharing-fast-prefill cannot be used with YOCO-U"),
    (dict(additional_config={"yocou": {"kernels": True}}), 'option "kernels" cannot be used on this machine'),
    (dict(disable_sliding_window=True), "--disable-sliding-window cannot be used with YOCO-U"),
    (dict(hf_overrides={"num_iterations": 0}), "num_iterations is 0: it must be a whole number of at least 1"),
    (dict(hf_overrides={"sliding_window": "wide"}), "sliding_window is 'wide': it must be a whole number"),
    (dict(hf_overrides={"diff_attention": True}), "config key 'diff_attention' is True"),
    (dict(load_format="fastsafetensors"), "--load-format fastsafetensors cannot be used on a CPU: it reads files into"),
    (
        dict(kv_transfer_config={"kv_connector": "MoRIIOConnector", "kv_role": "kv_both"}),
        "the KV connector MoRIIOConnector cannot be used with YOCO-U",
    ),
    (dict(kv_offloading_size=1), "--kv-offloading-size cannot be used on a CPU"),
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
    (  # of six query heads, two ranks would have three
        dict(
            tensor_parallel_size=2,
            hf_overrides={"differential_attention": "v3", "num_attention_heads": 3, "num_key_value_heads": 1},
        ),
        "num_attention_heads 3 is not divisible by the tensor parallel size 2",
    ),
]
WITHOUT_A_DRAFT_MODEL = "use 'ngram', 'ngram_gpu', 'suffix' or 'custom_class', or leave it out"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model(tiny.config()).save_pretrained(folder)
    return str(folder)


def engine_args(checkpoint: str, **settings) -> EngineArgs:
    return EngineArgs(model=checkpoint, skip_tokenizer_init=True, dtype="float32", **settings)


def configured(checkpoint: str, **settings):
    return engine_args(checkpoint, **settings).create_engine_config()


@pytest.mark.parametrize("settings, sentence", REFUSED, ids=[str(settings) for settings, _ in REFUSED])
def test_refused(checkpoint, settings, sentence):
    with pytest.raises((ValueError, NotImplementedError), match=sentence):
        configured(checkpoint, **settings)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}), "with KV connectors"),
        (dict(), "with breakable CUDA graphs"),
    ],
)
def test_kernels_are_refused_where_vllm_wraps_its_attention(checkpoint, monkeypatch, settings, sentence):
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    monkeypatch.setattr("vllm.compilation.breakable_cudagraph.is_breakable_cudagraph_enabled", lambda: not settings)
    with pytest.raises(ValueError, match=f'option "kernels" cannot be used {sentence}'):
        configured(checkpoint, additional_config={"yocou": {"kernels": True}}, **settings)


def test_kernels_are_refused_with_batch_invariance(checkpoint, monkeypatch):
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    monkeypatch.setattr("vllm.envs.VLLM_BATCH_INVARIANT", True, raising=False)
    with pytest.raises(ValueError, match='option "kernels" cannot be used with VLLM_BATCH_INVARIANT=1: other requests'):
        configured(checkpoint, additional_config={"yocou": {"kernels": True}})


def test_compiled_code_is_not_shared_with_and_without_kernels(checkpoint, monkeypatch):
    """With them norms and rotations are no part of what is compiled."""
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    hashes = {
        configured(checkpoint, additional_config={"yocou": {"kernels": on}}).compute_hash() for on in (False, True)
    }
    assert len(hashes) == 2


def test_a_draft_model_is_refused(checkpoint):
    draft = {"method": "draft_model", "model": checkpoint, "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match=rf"by 'draft_model' cannot be used with YOCO-U: .* {WITHOUT_A_DRAFT_MODEL}"):
        configured(checkpoint, speculative_config=draft)


@pytest.mark.parametrize("method", ["eagle", "mtp", "medusa", "extract_hidden_states"])
def test_other_speculative_methods_are_refused(method):
    """Checked alone: vLLM makes no config of most of them without the model that they draft with."""
    asked = SimpleNamespace(speculative_config=SimpleNamespace(method=method))
    with pytest.raises(ValueError, match=f"by '{method}' cannot be used with YOCO-U: .* {WITHOUT_A_DRAFT_MODEL}"):
        check_speculation(asked)


def test_ngram_on_the_gpu_needs_the_v2_runner(checkpoint):
    asked = {"method": "ngram_gpu", "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match=r"by 'ngram_gpu' .* V1 runner, which a CPU always has: .*, use 'ngram'\."):
        configured(checkpoint, speculative_config=asked)
    check_speculation(SimpleNamespace(speculative_config=SimpleNamespace(method="ngram_gpu"), use_v2_model_runner=True))


def test_suffix_decoding_names_the_package_that_it_needs(checkpoint, monkeypatch):
    monkeypatch.setattr("vllm.config.speculative.has_arctic_inference", lambda: False)
    with pytest.raises(ImportError, match=r"Arctic Inference is required for suffix decoding.*pip install"):
        configured(checkpoint, speculative_config={"method": "suffix"})


def test_overrides_by_a_function_are_checked_too(checkpoint):
    def override(config):
        config.num_iterations = -1
        return config

    with pytest.raises(ValueError, match="num_iterations is -1"):
        configured(checkpoint, hf_overrides=override)


@pytest.mark.parametrize("overrides", [dict(moe_latent_size=40), dict(hidden_size=80)], ids=str)
def test_experts_on_a_cpu_take_some_widths_alone(overrides, tmp_path):
    tiny.moe_config(architectures=["YocoUForCausalLM"], **overrides).save_pretrained(tmp_path)
    ((key, size),) = overrides.items()
    with pytest.raises(ValueError, match=f"{key} {size} cannot be used with a mixture of experts on a CPU: .* of 32"):
        configured(str(tmp_path), load_format="dummy")


def test_dense_layers_before_experts_are_split_too(tmp_path):
    sizes = dict(first_k_dense_replace=1, intermediate_size=161)
    tiny.moe_config(architectures=["YocoUForCausalLM"], **sizes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="intermediate_size 161 is not divisible by the tensor parallel size 2"):
        configured(str(tmp_path), load_format="dummy", tensor_parallel_size=2)


@pytest.mark.parametrize(
    "limit, quantized, chosen, expected",
    [
        (10.0, None, "auto", "triton"),
        (10.0, None, "marlin", "marlin"),
        (10.0, "fp8", "auto", "auto"),
        (None, None, "auto", "auto"),
    ],
)
def test_experts_that_clamp_take_triton_on_a_gpu(limit, quantized, chosen, expected, monkeypatch):
    settings = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=tiny.moe_config(swiglu_limit=limit), quantization=quantized),
        kernel_config=SimpleNamespace(moe_backend=chosen),
    )
    choose_clamping_experts(settings)
    assert settings.kernel_config.moe_backend == chosen  # a CPU has kernels of its own
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cuda=lambda: True))
    choose_clamping_experts(settings)
    assert settings.kernel_config.moe_backend == expected


@pytest.mark.parametrize(
    "dtype, cpu, refused", [("float32", False, True), ("bfloat16", False, False), ("float32", True, False)]
)
def test_adapters_in_float32_are_refused_on_a_gpu(dtype, cpu, refused, monkeypatch):
    settings = SimpleNamespace(model_config=SimpleNamespace(dtype=getattr(torch, dtype)), lora_config=object())
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    with (
        pytest.raises(ValueError, match="--enable-lora cannot be used in float32 on a GPU")
        if refused
        else nullcontext()
    ):
        check_lora(settings)


def test_what_experts_allow(tmp_path):
    tiny.model(tiny.moe_config(moe_intermediate_size=50)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="moe_intermediate_size 50 is not divisible by the tensor parallel size 4"):
        configured(str(tmp_path), tensor_parallel_size=4)
    # Whole experts are split over ranks, whatever their width.
    configured(str(tmp_path), tensor_parallel_size=4, enable_expert_parallel=True)
    with pytest.raises(ValueError, match="--enable-expert-parallel cannot be used on a CPU with quantized weights"):
        configured(str(tmp_path), tensor_parallel_size=4, enable_expert_parallel=True, quantization="experts_int8")
    with pytest.raises(ValueError, match="--data-parallel-size cannot be used on a CPU with a quantized mixture"):
        configured(str(tmp_path), data_parallel_size=2, quantization="experts_int8")
    with pytest.raises(ValueError, match="50 is not divisible by the tensor parallel size 2 times the data parallel"):
        configured(str(tmp_path), tensor_parallel_size=2, data_parallel_size=2)
    with pytest.raises(ValueError, match="--enable-lora cannot be used with a mixture of experts on a CPU"):
        configured(str(tmp_path), enable_lora=True)


def test_a_gate_that_is_left_to_the_weights(tmp_path):
    """They are not looked at before they are loaded; where no names are loaded, nothing could decide later."""
    tiny.moe_config(architectures=["YocoUForCausalLM"]).save_pretrained(tmp_path)

    def gate(**settings):
        return configured(str(tmp_path), **settings).model_config.hf_config.shared_expert_gate

    assert gate() is None
    assert gate(load_format="dummy") is False
    assert gate(load_format="sharded_state", hf_overrides={"shared_expert_gate": True}) is True
    for load_format in NAMELESS:
        with pytest.raises(ValueError, match=f"--load-format {load_format} cannot be used with a config.json that"):
            gate(load_format=load_format)


def test_the_window_stays_with_the_layers_that_have_one(checkpoint):
    """A model-wide window would be inherited by the global cache."""
    assert configured(checkpoint).cache_config.sliding_window is None


def test_vllms_default_chunk_is_lowered_and_announced(checkpoint, lines):
    """Offline and online defaults differ; any other value is a user's own."""
    for usage in (UsageContext.LLM_CLASS, UsageContext.OPENAI_API_SERVER):
        lines.clear()
        found = engine_args(checkpoint).create_engine_config(usage)
        assert found.scheduler_config.max_num_batched_tokens == CHUNK_ON_CPU == found.max_in_flight_tokens
        assert f"max_num_batched_tokens is {CHUNK_ON_CPU} for YOCO-U instead of vLLM's default" in "".join(lines)


@pytest.mark.parametrize("chunk", [512, 8191, 20000])
def test_a_users_own_chunk_is_kept(checkpoint, chunk):
    found = configured(checkpoint, max_num_batched_tokens=chunk)
    assert found.scheduler_config.max_num_batched_tokens == chunk


def test_a_default_that_the_user_means_is_kept_too(checkpoint):
    keep = {"yocou": {"lower_chunk": False}}
    found = configured(checkpoint, max_num_batched_tokens=2048, additional_config=keep)
    assert found.scheduler_config.max_num_batched_tokens == 2048


def test_a_chunk_that_must_be_large_stays(checkpoint):
    """vLLM wants a token for each sequence, and whole prompts where chunks are off."""
    many = configured(checkpoint, max_num_seqs=1500)
    assert many.scheduler_config.max_num_batched_tokens == 1500
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    drafted = configured(checkpoint, max_num_seqs=500, speculative_config=drafts)
    assert drafted.scheduler_config.max_num_batched_tokens == 2000
    whole = configured(checkpoint, enable_chunked_prefill=False, max_num_seqs=8)
    assert whole.scheduler_config.max_num_batched_tokens > CHUNK_ON_CPU


@pytest.mark.parametrize("decoded, tokens", [(8, CHUNK_ON_GPU), (1024, CHUNK_ON_GPU), (5000, 10_000)])
def test_a_gpu_takes_longer_chunks_of_which_decodes_leave_half(decoded, tokens, monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert longest_chunk(decoded) == tokens


def test_the_v1_runner_is_asked_who_wants_prompt_logprobs(checkpoint):
    assert configured(checkpoint).model_config.logits_processors == [v1_runner.NAME]
    own = ["somewhere:Processor"]
    assert configured(checkpoint, logits_processors=own).model_config.logits_processors == [*own, v1_runner.NAME]


def test_what_it_refuses_is_refused_whether_rows_skip_or_not(checkpoint):
    off = configured(checkpoint, additional_config={"yocou": {"skip_rows": False}})
    assert off.model_config.logits_processors == [v1_runner.NAME]


def test_and_is_not_asked_where_it_takes_no_such_class(checkpoint):
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    for settings in (dict(speculative_config=ngram), dict(runner="pooling")):
        assert not configured(checkpoint, **settings).model_config.logits_processors


def test_what_cannot_be_refused_under_speculation_is_said(checkpoint, lines):
    configured(checkpoint, speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3})
    assert "A request with a seed and temperature above 0 ends vLLM's CPU engine" in "".join(lines)


def test_unknown_options_are_refused(checkpoint):
    with pytest.raises(ValueError, match="has no option 'skip'"):
        configured(checkpoint, additional_config={"yocou": {"skip": False}})


@pytest.fixture
def no_compiler():
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


@needs_compiler
def test_compiled_where_vllm_would(checkpoint, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert configured(checkpoint).compilation_config.mode.name == "DYNAMO_TRACE_ONCE"
    assert configured(checkpoint, enforce_eager=True).compilation_config.mode.name == "NONE"


def test_eager_without_a_compiler(checkpoint, no_compiler, lines, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert configured(checkpoint).compilation_config.mode.name == "NONE"
    assert any("runs eagerly" in line and "there is no C++ compiler here" in line for line in lines)
    lines.clear()
    assert configured(checkpoint, enforce_eager=True).compilation_config.mode.name == "NONE"
    assert not any("eagerly" in line for line in lines)
    with pytest.raises(ValueError, match="mode 3 cannot be used: there is no C\\+\\+ compiler here, leave"):
        configured(checkpoint, compilation_config={"mode": 3})


@needs_compiler
def test_eager_without_python_headers(checkpoint, lines, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert configured(checkpoint).compilation_config.mode.name == "NONE"
    assert any("Python's header files are not here" in line for line in lines)


def test_eager_where_dynamo_is_off(checkpoint, lines, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert configured(checkpoint).compilation_config.mode.name == "NONE"
    assert any("TORCHDYNAMO_DISABLE is set" in line for line in lines)
