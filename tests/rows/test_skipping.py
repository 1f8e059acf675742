"""Prompt rows skip the cross-decoder in vLLM's V1 and V2 runners, and no answer changes.

One engine a runner: chunks of 37 tokens, eight requests at a time, prefix caching; and engines that speculate.
"""

import random
from importlib.util import find_spec

import pytest
from harness import tiny
from harness.oracle import check
from harness.runners import Batch, EngineProcess

CHUNK = 37
RUNNERS = ("v1", "v2")
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
NGRAM_GPU = NGRAM | {"method": "ngram_gpu"}
NEEDS_ARCTIC_INFERENCE = pytest.mark.skipif(
    find_spec("arctic_inference") is None, reason="needs the package arctic-inference, which no extra installs"
)
SUFFIX = {"method": "suffix"}  # up to 24 drafts
CUSTOM_CLASS = {"method": "custom_class", "model": "harness.drafts.AfterTheLastToken", "num_speculative_tokens": 3}


def mixed(count: int, seed: int) -> list[dict]:
    """Requests of many lengths, every third with prompt log probabilities, that end in another order than they came."""
    draw = random.Random(seed)
    requests = []
    for i in range(count):
        sampling = {"max_tokens": draw.randint(1, 12)} | ({"prompt_logprobs": 1} if i % 3 == 1 else {})
        requests.append({"prompt": tiny.prompt(draw.randint(1, 4 * CHUNK), seed + i), "sampling": sampling})
    return requests


def preempting() -> list[dict]:
    """Eight requests that grow, token by token, until the pool cannot hold their second global blocks.

    Those that come first have the shortest prompts, so that all are near the end of their first block together.
    """
    lengths = range(160, 200, 5)
    return [{"prompt": tiny.prompt(length, length), "sampling": {"max_tokens": 200 - length}} for length in lengths]


SHARED = tiny.prompt(210, seed=77)  # a global block and some more
BATCHES = {
    "mixed": mixed(10, seed=100),
    "alone": [{"prompt": tiny.prompt(3 * CHUNK)}],
    "boundaries": [
        {"prompt": tiny.prompt(length), "sampling": {"max_tokens": 4}}
        for length in (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK)
    ],
    "n-best": [
        {"prompt": tiny.prompt(100, seed), "sampling": {"n": 3, "temperature": 1, "max_tokens": 4}} for seed in (8, 9)
    ],
    "first": [{"prompt": SHARED}],
    "again": [{"prompt": SHARED}, {"prompt": SHARED, "sampling": {"prompt_logprobs": 1}}],
    "preempted": preempting(),
}


def rows(request: dict, cached: int = 0) -> tuple[int, int]:
    """Rows through the self-decoder and the cross-decoder that one request must cost."""
    sampling = request.get("sampling", {})
    prompt, generated = len(request["prompt"]) - cached, sampling.get("max_tokens", 12) - 1
    return prompt + generated, (prompt if "prompt_logprobs" in sampling else 1) + generated


class Ran:
    def __init__(self, process: EngineProcess, folder, **settings):
        self.model = tiny.model(tiny.config(qk_norm="all", cross_decoder_rope=True))
        self.model.save_pretrained(folder)
        batches = process.run(folder, list(BATCHES.values()), **settings)
        self.batches = dict(zip(BATCHES, batches, strict=True))

    def check(self, name: str) -> Batch:
        check(self.model, BATCHES[name], self.batches[name].outputs)
        return self.batches[name]


@pytest.fixture(scope="module", params=RUNNERS)
def ran(request, engine_processes, tmp_path_factory):
    # 28 blocks of 192 global tokens: eight requests hold one each and two for their windows, but not two and two.
    process = engine_processes.of(request.param)
    return Ran(process, tmp_path_factory.mktemp("checkpoint"), kv_cache_memory_bytes=28 * 192 * 512)


@pytest.mark.parametrize("name", ["mixed", "alone", "boundaries"])
def test_each_request_runs_the_rows_that_it_needs(ran, name):
    metrics = ran.check(name).metrics
    self_rows, cross_rows = (sum(counts) for counts in zip(*map(rows, BATCHES[name]), strict=True))
    assert metrics["yocou_self_decoder_rows"] == self_rows
    assert metrics["yocou_cross_decoder_rows"] == cross_rows
    assert metrics["yocou_skipped_rows"] == self_rows - cross_rows > 0


def test_n_best(ran):
    batch = ran.check("n-best")
    assert all(len(output.outputs) == 3 for output in batch.outputs)
    assert batch.metrics["yocou_skipped_rows"] > 0


def test_prefix_hits(ran):
    ran.check("first")
    batch = ran.check("again")
    hit, scored = (output.num_cached_tokens for output in batch.outputs)
    assert hit > 0 and scored == 0  # vLLM computes again what it must score
    expected = [rows({"prompt": SHARED}, hit), rows(BATCHES["again"][1])]
    assert batch.metrics["yocou_cross_decoder_rows"] == sum(cross for _, cross in expected)


def test_preempted_requests(ran):
    batch = ran.check("preempted")
    assert batch.metrics["num_preemptions"] > 0 and batch.metrics["yocou_skipped_rows"] > 0


@pytest.mark.parametrize(
    "engine_process, skips",
    [
        pytest.param("v1", False, marks=pytest.mark.runner("v1")),
        pytest.param("v2", True, marks=pytest.mark.runner("v2")),
    ],
    indirect=["engine_process"],
)
def test_ngram_speculation_is_exact(engine_process, skips, tmp_path):
    """V2 skips under speculation too; V1 cannot tell who wants prompt log probabilities then, and skips nothing."""
    speculating(engine_process, skips, tmp_path, NGRAM)


@pytest.mark.parametrize(
    "engine_process, skips, speculation",
    [
        ("v1", False, CUSTOM_CLASS),
        pytest.param("v1", False, SUFFIX, marks=[NEEDS_ARCTIC_INFERENCE, pytest.mark.slow]),
        pytest.param("v2", True, NGRAM_GPU, marks=pytest.mark.slow),
    ],
    indirect=["engine_process"],
    ids=["custom_class", "suffix", "ngram_gpu"],
)
def test_other_speculation_is_exact(engine_process, skips, speculation, tmp_path):
    speculating(engine_process, skips, tmp_path, speculation)


def speculating(process: EngineProcess, skips: bool, folder, speculation: dict) -> None:
    model = tiny.model(tiny.config())
    model.save_pretrained(folder)
    repeating = [{"prompt": tiny.prompt(9, seed) * 11, "sampling": {"max_tokens": 16}} for seed in range(2)]
    # A prompt of one token next to another's decode is scheduled with drafts, which nothing was sampled before.
    padded = [{"prompt": tiny.prompt(length, 5), "sampling": {"max_tokens": 8}} for length in (CHUNK, 1, 100)]
    requests = [*padded, *mixed(4, seed=300), *repeating]
    (batch,) = process.run(folder, [requests], speculative_config=speculation)
    check(model, requests, batch.outputs)
    self_rows, cross_rows = (sum(counts) for counts in zip(*map(rows, requests), strict=True))
    assert batch.metrics["yocou_skipped_rows"] == (self_rows - cross_rows if skips else 0)
    assert batch.metrics["yocou_self_decoder_rows"] > self_rows  # refused drafts are rows as well
    assert batch.metrics["spec_decode_num_accepted_tokens"] > 0


@pytest.mark.runner("v2-triton")
@pytest.mark.parametrize("engine_process", ["v2-triton"], indirect=True)
def test_cudas_triton_attention_on_packed_blocks(engine_process, tmp_path):
    """Blocks of 16 tokens, token-major pages, and fewer queries than keys in vLLM's Triton kernels."""
    model = tiny.model(tiny.config())
    model.save_pretrained(tmp_path)
    requests = [
        {"prompt": tiny.prompt(41), "sampling": {"max_tokens": 3}},
        {"prompt": tiny.prompt(19), "sampling": {"max_tokens": 2, "prompt_logprobs": 1}},
    ]
    (batch,) = engine_process.run(tmp_path, [requests], max_model_len=64)
    check(model, requests, batch.outputs)
    assert batch.metrics["yocou_skipped_rows"] == 40


def test_switched_off(engine_process, tmp_path):
    model = tiny.model(tiny.config())
    model.save_pretrained(tmp_path)
    requests = mixed(5, seed=400)
    (batch,) = engine_process.run(tmp_path, [requests], additional_config={"yocou": {"skip_rows": False}})
    check(model, requests, batch.outputs)
    assert batch.metrics["yocou_skipped_rows"] == 0
    assert batch.metrics["yocou_cross_decoder_rows"] == batch.metrics["yocou_self_decoder_rows"] > 0
