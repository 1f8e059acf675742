"""With VLLM_BATCH_INVARIANT on a CPU, what a request is told does not depend on its company, in a single bit."""

import math
from itertools import takewhile

import pytest
from harness import tiny
from vllm import envs
from vllm.engine.arg_utils import EngineArgs

from benchmarks.prober import ALONE, HIT, PREEMPTED, Prober

# Heads so wide that attention's tiles depend on a request's rows, and matrices whose order of sums does.
WIDE = dict(hidden_size=512, intermediate_size=1536, head_dim=128, num_attention_heads=8, sliding_window=100)
COMPANY = dict(tokens=333, others=7, longest=60, chunks=(37, 100))
SETTINGS = dict(max_num_batched_tokens=512, enable_prefix_caching=True)
MIXED = dict(hidden_size=512, moe_intermediate_size=1536, head_dim=128, num_attention_heads=4)
MODELS = {
    "dense": (tiny.config, WIDE | dict(num_iterations=3)),
    "gates": (tiny.config, WIDE | dict(num_iterations=1, headwise_glu=True, intermediate_size=1376)),
    "mixture": (tiny.moe_config, MIXED | dict(num_iterations=1, shared_expert_gate=True)),
    "mixture, T = 3": (tiny.moe_config, MIXED | dict(num_iterations=3, tie_word_embeddings=True)),
}


@pytest.fixture
def invariant(monkeypatch):
    """As in a process of its own: vLLM keeps the value that an earlier test has found."""
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    yield
    envs.disable_envs_cache()


def found(engine, folder, kind: str, **settings) -> dict[tuple[str, str], float]:
    make, sizes = MODELS[kind]
    tiny.model(make(**sizes)).save_pretrained(folder)
    prober = Prober(engine(folder, **SETTINGS | settings), **COMPANY)
    return {(what, company): difference for what, company, difference in prober.differences()}


DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
COMPILED = {"compilation_config": {"mode": 3}}
QUICKER = [("dense", dict(dtype="float32")), ("mixture", dict(dtype="bfloat16"))]
SLOWER = [
    ("gates", dict(dtype="float32")),
    ("dense", dict(dtype="bfloat16")),
    ("mixture, T = 3", dict(dtype="float32")),
    ("dense", dict(dtype="bfloat16", speculative_config=DRAFTS)),
    ("gates", dict(dtype="float32") | COMPILED),
    ("dense", dict(dtype="bfloat16") | COMPILED),
    ("mixture", dict(dtype="float32") | COMPILED),
]
CASES = [
    pytest.param(kind, settings, id=f"{kind}, {settings}", marks=pytest.mark.slow if is_slow else ())
    for is_slow, cases in enumerate((QUICKER, SLOWER))
    for kind, settings in cases
]


@pytest.mark.parametrize("kind, settings", CASES)
def test_no_bit_depends_on_company(kind, settings, engine, invariant, tmp_path):
    """Alone, among others, in chunks, after a prefix hit, after a preemption; T = 1 and T = 3, gates, a tied head."""
    differences = found(engine, tmp_path, kind, **settings)
    assert len(differences) == 10 and {("answer", HIT), ("answer", PREEMPTED)} < differences.keys()
    assert set(differences.values()) == {0}


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype", [("dense", "float32"), ("mixture", "bfloat16")])
def test_without_it_bits_do_depend_on_company(kind, dtype, engine, tmp_path):
    """So that the sizes of these tests show what they are for; and no more than the documentation says."""
    differences = found(engine, tmp_path, kind, dtype=dtype)
    print(kind, dtype, differences)
    assert differences["answer", ALONE] == 0
    assert 0 < max(differences.values()) < (1e-4 if dtype == "float32" else 0.2)


REFUSED = [
    (dict(quantization="fp8_per_channel"), r"quantization \(fp8_per_channel\)"),
    (dict(kv_cache_dtype="fp8"), "--kv-cache-dtype fp8"),
    (dict(enable_lora=True), "--enable-lora"),
    (dict(tensor_parallel_size=4), "--tensor-parallel-size 4"),
    (dict(runner="pooling"), "--runner pooling"),
    (dict(worker_cls="vllm.v1.worker.cpu_worker.CPUWorker"), "--worker-cls vllm"),
]


@pytest.mark.parametrize("settings, thing", REFUSED, ids=[thing for _, thing in REFUSED])
def test_what_is_not_known_to_keep_every_bit_is_refused(settings, thing, invariant, tmp_path):
    tiny.config(num_attention_heads=4, num_key_value_heads=4, architectures=["YocoUForCausalLM"]).save_pretrained(
        tmp_path
    )
    arguments = EngineArgs(str(tmp_path), skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", **settings)
    with pytest.raises(ValueError, match=f"{thing}.* cannot be used with VLLM_BATCH_INVARIANT=1 on a CPU: "):
        arguments.create_engine_config()


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine_process, kind",
    [
        pytest.param("v2-invariant", "dense", marks=pytest.mark.runner("v2-invariant")),
        pytest.param("two-ranks-invariant", "dense", marks=pytest.mark.runner("two-ranks-invariant")),
        ("v2-invariant", "mixture"),
        ("two-ranks-invariant", "mixture"),
    ],
    indirect=["engine_process"],
)
def test_no_bit_depends_on_company_on_other_runners(kind, engine_process, tmp_path):
    """A prompt alone, and again among others and in other chunks: vLLM's V2 runner, and two tensor parallel ranks."""
    make, sizes = MODELS[kind]
    tiny.model(make(**sizes)).save_pretrained(tmp_path)
    probe = {"prompt": tiny.prompt(133), "sampling": {"logprobs": 0, "prompt_logprobs": 0}}
    others = [{"prompt": tiny.prompt(length)} for length in (5, 40, 77)]
    alone, among = engine_process.run(tmp_path, [[probe], [*others[:2], probe, others[2]]], dtype="bfloat16")
    assert alone.outputs[0].prompt_logprobs == among.outputs[2].prompt_logprobs
    assert alone.outputs[0].outputs[0].logprobs == among.outputs[2].outputs[0].logprobs
    assert len(alone.outputs[0].outputs[0].logprobs) > 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine_process", ["v2", "two-ranks"], indirect=True)
def test_without_it_other_runners_differ_by_no_more_than_the_page_says(dtype, engine_process, tmp_path):
    make, sizes = MODELS["dense"]
    tiny.model(make(**sizes)).save_pretrained(tmp_path)
    probe = {"prompt": tiny.prompt(133), "sampling": {"logprobs": 0, "prompt_logprobs": 0}}
    others = [{"prompt": tiny.prompt(length)} for length in (5, 40, 77)]
    alone, among = engine_process.run(tmp_path, [[probe], [*others[:2], probe, others[2]]], dtype=dtype)
    rows = zip(alone.outputs[0].outputs[0].logprobs, among.outputs[2].outputs[0].logprobs, strict=True)
    same = takewhile(lambda pair: pair[0].keys() == pair[1].keys(), rows)  # another token goes on with another text
    difference = max(
        (abs(one[token].logprob - other[token].logprob) for one, other in same for token in one), default=math.inf
    )
    print(dtype, difference)
    assert difference < (1e-4 if dtype == "float32" else 0.2)


def test_the_variable_cannot_be_changed_beside_an_engine(invariant, monkeypatch, tmp_path):
    """vLLM keeps the value that it found when the first engine started, and would start this one without a word."""
    tiny.config(architectures=["YocoUForCausalLM"]).save_pretrained(tmp_path)
    monkeypatch.setitem(vars(envs), "VLLM_BATCH_INVARIANT", False)
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT cannot be changed while an engine lives"):
        EngineArgs(str(tmp_path), skip_tokenizer_init=True, load_format="dummy").create_engine_config()
