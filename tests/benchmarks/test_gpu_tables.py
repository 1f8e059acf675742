"""The tables of a GPU: that their cells follow from recorded runs, and how they are measured, without a GPU."""

import json
import statistics
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from harness.checkout import ROOT

from benchmarks import render, results
from benchmarks.results import Result
from benchmarks.tables import gpu as tables
from benchmarks.tables.catalogue import TABLES
from benchmarks.tables.comparisons import LIKE_PAPER, OURS
from benchmarks.tables.gpu import EVERY_ROW, KERNELS, SKIPPING, in_chunks

K = 1 << 10
PAGE = ROOT / "docs" / "cuda.md"
NAMES = ("gpu_prefill", "gpu_decode", "gpu_exactness", "kernels")


def shown(result: Result) -> list[list]:
    """The rows of its table."""
    return TABLES[result.table].rows(result)[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_every_gpu(name):
    assert PAGE in render.PAGES
    (result, *_) = Result.all_of(name)
    header, rows = TABLES[name].rows(result)
    assert rows and all(len(row) == len(header) for row in rows)
    assert render.section(result) in PAGE.read_text()


def test_a_cell_of_the_page_follows_from_the_recorded_runs():
    """Read from the file by hand, past everything that makes tables of it."""
    (result, *_) = Result.all_of("gpu_prefill")
    runs = {
        (one["of"]["model"], one["of"]["way"]): one["runs"]
        for one in json.loads(result.path.read_text())["measurements"]
        if one["of"]["tokens"] == 64 * K
    }
    ours, theirs = runs[in_chunks(8 * K), SKIPPING], runs[LIKE_PAPER, EVERY_ROW]
    assert len(ours) == len(theirs) == 3
    speed = f"{64 * K / statistics.median(ours):,.0f}"
    faster = f"{statistics.median(theirs) / statistics.median(ours):.2f}x (paper 2.79x)"
    (line,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| 65,536 | {in_chunks(8 * K)} |"))
    cells = line.strip("| ").split(" | ")
    assert cells[3] == speed and cells[-1] == faster


def test_prefill_is_compared_with_the_first_model_and_the_transformer():
    result = Result("gpu_prefill", "")
    for tokens in (4 * K, 16 * K):
        of = dict(tokens=tokens, model=in_chunks(K))
        result.add("first token", "s", [9.0, 8.0, 1.0], **of, way=EVERY_ROW)
        result.add("first token", "s", [4.0], **of, way=SKIPPING)
        if tokens == 16 * K:
            result.add("first token", "s", [2.0], tokens=tokens, model=LIKE_PAPER, way=EVERY_ROW)
    assert shown(result) == [
        ["4,096", in_chunks(K), "512", "1,024", "2.00x", "1.00x", ""],
        ["16,384", in_chunks(K), "2,048", "4,096", "2.00x", "1.00x", "0.50x (paper 1.14x)"],
        ["16,384", LIKE_PAPER, "8,192", "", "", "", ""],
    ]


def test_decode_leaves_out_what_does_not_fit():
    """The paper's ratios are those of 32 requests."""
    result = Result("gpu_decode", "")
    for batch, model, step_s in ((1, in_chunks(K), 0.004), (1, LIKE_PAPER, 0.002), (32, in_chunks(K), 0.016)):
        result.add("decode step", "s", [1.0, step_s, 0.001], batch=batch, tokens=16 * K, model=model)
    result.add("decode step", "s", [0.032], batch=32, tokens=16 * K, model=KERNELS)
    assert shown(result) == [
        [1, "16,384", in_chunks(K), "4.000 ms", "250", "1.00x", "0.50x"],
        [1, "16,384", LIKE_PAPER, "2.000 ms", "500", "2.00x", ""],
        [32, "16,384", in_chunks(K), "16.000 ms", "2,000", "1.00x", ""],
        [32, "16,384", KERNELS, "32.000 ms", "1,000", "0.50x", ""],
    ]
    result.add("decode step", "s", [0.024], batch=32, tokens=16 * K, model=LIKE_PAPER)
    assert shown(result)[2][-1] == "1.50x (paper 1.10x)"


def test_speed_is_compared_with_the_transformer():
    """At 64K tokens the paper's ratios stand beside, in decode for 32 requests."""
    result = Result("gpu_speed", "", settings=dict(batches=[1, 32]))
    for model, way, first_s in ((OURS, EVERY_ROW, 9.0), (OURS, SKIPPING, 4.0), (LIKE_PAPER, EVERY_ROW, 8.0)):
        result.add("first token", "s", [first_s], tokens=64 * K, model=model, way=way)
    for model, batch, step_s in ((OURS, 1, 0.004), (LIKE_PAPER, 1, 0.002), (OURS, 32, 0.016), (LIKE_PAPER, 32, 0.024)):
        result.add("decode step", "s", [step_s], tokens=64 * K, model=model, batch=batch)
    paper = ("2.00x (paper 2.79x)", "1.50x (paper 1.92x)")
    assert shown(result) == [
        ["65,536", OURS, "16,384", paper[0], "4.000 ms", "0.50x", "16.000 ms", paper[1]],
        ["65,536", LIKE_PAPER, "8,192", "", "2.000 ms", "", "24.000 ms", ""],
    ]


def test_a_median_in_place_of_its_runs_is_called_transcribed():
    for result in Result.all_of("gpu_decode"):
        assert result.transcribed or all(len(one.runs) == result.settings["steps"] for one in result.measurements)


def add_checks(result: Result, dtype: str, run: str, model: str, others: int = 0) -> None:
    """Two checks of a model."""
    of = dict(dtype=dtype, run=run, model=model)
    for name, runs in (
        (tables.COMPARED, [100, 50]),
        (tables.GREEDY, [10, 20]),
        (tables.OTHERS, [0, others]),
        (tables.LARGEST, [1e-5, 2e-5]),
        (tables.OWN_LARGEST, [4e-5, 1e-5]),
        (tables.MEDIAN, [1e-7, 3e-7]),
        (tables.SKIPPED, [39, 0]),
        (tables.TO_SKIP, [39, 1]),
    ):
        result.add(name, "", runs, **of)


def test_exactness_sums_models_and_runs():
    """The ratio is a check's own: here the largest difference is in one check and the reference's in another."""
    result = Result("gpu_exactness", "")
    add_checks(result, "float32", "eager", "a")
    add_checks(result, "float32", "eager", "b", others=1)
    add_checks(result, "float32", "graphs", "a")
    add_checks(result, "bfloat16", "eager", "a")
    ends = ["2.0e-05", "4.0e-05", "2.00x", "2.0e-07", ""]
    assert shown(result) == [
        ["float32", "eager", "a, b", "300", "1 of 60", *ends, "78 of 80"],
        ["float32", "graphs", "a", "150", "0 of 30", *ends, "39 of 40"],
        ["float32", "all", "", "450", "1 of 90", *ends, "117 of 120"],
        ["bfloat16", "eager", "a", "150", "0 of 30", *ends, "39 of 40"],
    ]


def test_the_h100_kept_the_bound_in_float32():
    """What docs/cuda.md says of the table."""
    (result, *_) = Result.all_of("gpu_exactness")
    rows = [row for row in shown(result) if row[0] == "float32"]
    assert rows[-1][1] == "all" and rows[-1][4].startswith("0 of ")
    for row in rows:
        assert float(row[7].removesuffix("x")) <= 3
        skipped, could = row[-1].split(" of ")
        assert skipped == could


@pytest.mark.parametrize("words", [["gpu", "prefill"], ["gpu", "decode"], ["gpu_exactness"]])
def test_without_a_gpu_one_sentence_and_code_2(monkeypatch, capsys, words):
    from importlib import import_module

    module = import_module(f"benchmarks.{words[0]}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{'_'.join(words)} needs a GPU, and torch finds none on this machine.\n"


@pytest.fixture
def engines(monkeypatch) -> list[SimpleNamespace]:
    """Instead of vLLM's: each notes its settings, answers after a second, and holds one request at most."""
    from benchmarks import gpu

    started: list[SimpleNamespace] = []

    def start(cfg, **settings):
        selectors = [SimpleNamespace(may_skip=True)] if cfg.model_type == "yoco_u" else []
        started.append(SimpleNamespace(cfg=cfg, settings=settings, selectors=selectors, alive=True))
        return started[-1]

    def runner(llm):
        builders = [SimpleNamespace(selector=selector) for selector in llm.selectors] or [SimpleNamespace()]
        groups = [SimpleNamespace(get_metadata_builder=lambda builder=builder: builder) for builder in builders]
        return SimpleNamespace(attn_groups=[groups])

    def core(llm):
        chunk = llm.settings.get("max_num_batched_tokens", 4 * K)
        cache = SimpleNamespace(num_blocks=2)
        return SimpleNamespace(scheduler=SimpleNamespace(max_num_scheduled_tokens=chunk, kv_cache_config=cache))

    @contextmanager
    def decoding(llm, batch, context, room):
        assert room >= gpu.STEPS
        yield

    def stop(llm):
        llm.alive = False

    for name, value in dict(
        start=start,
        runner=runner,
        core=core,
        stop=stop,
        decoding=decoding,
        prompt_s=lambda llm, tokens: 1.0 if all(one.may_skip for one in llm.selectors) else 2.0,
        held_in_decode=lambda llm, tokens: 1,
        steps_of_prompts=lambda llm, batch, context: 1,
        step_s=lambda llm: 0.5,
    ).items():
        monkeypatch.setattr(gpu, name, value)
    return started


def test_prefill_is_measured_in_both_ways_on_one_engine_at_a_time(engines):
    from benchmarks import gpu

    result = gpu.measure("prefill", {K: 3, 4 * K: 1}, load_format="dummy")
    *ours, theirs = engines
    assert [one.settings["max_num_batched_tokens"] for one in ours] == [K, 8 * K, 16 * K, K]
    options = [one.settings["additional_config"]["yocou"] for one in ours]
    assert options == [{"lower_chunk": False}] * 3 + [{"lower_chunk": False, "kernels": True}]
    assert "max_num_batched_tokens" not in theirs.settings and theirs.cfg.num_hidden_layers == 20
    assert not any(one.alive for one in engines)
    chunks = {in_chunks(tokens): tokens for tokens in (K, 8 * K, 16 * K)} | {KERNELS: K, LIKE_PAPER: 4 * K}
    assert result.settings["chunks"] == chunks
    assert result.runs("first token", tokens=K, model=in_chunks(K), way=EVERY_ROW) == [2.0] * 3
    assert result.runs("first token", tokens=K, model=in_chunks(K), way=SKIPPING) == [1.0] * 3
    assert result.runs("first token", tokens=4 * K, model=LIKE_PAPER, way=SKIPPING) == []
    assert all(selector.may_skip for one in engines for selector in one.selectors)
    assert "medians of 3/1" in TABLES["gpu_prefill"].note(result) and len(shown(result)) == 10


def test_decode_is_measured_where_the_requests_fit(engines):
    from benchmarks import gpu

    result = gpu.measure("decode", {K: 1})
    assert [one.settings.get("additional_config") for one in engines] == [
        {"yocou": {"lower_chunk": False}},
        {"yocou": {"lower_chunk": False}},
        {"yocou": {"lower_chunk": False, "kernels": True}},
        None,
    ]
    assert result.keys("batch") == [1] and result.keys("model") == [in_chunks(K), in_chunks(8 * K), KERNELS, LIKE_PAPER]
    assert result.runs("decode step", model=KERNELS) == [0.5] * gpu.STEPS
    assert f"Medians of {gpu.STEPS} steps" in TABLES["gpu_decode"].note(result)


def test_differences_are_those_of_the_reference():
    """A served number is held against the exact one, the other precision notes the reference's own difference."""
    import torch

    from benchmarks.gpu_exactness import Comparison

    expected = torch.tensor([[-1.0, -2.0], [-2.0, -1.0], [-1.0, -1.0005]])
    reference = SimpleNamespace(log_probabilities=lambda ids: (expected, expected + 0.25))

    def served(values):
        return {token: SimpleNamespace(logprob=value) for token, value in values.items()}

    completion = SimpleNamespace(token_ids=[0, 1], logprobs=[served({0: -2.5}), served({1: -1.0005})])
    output = SimpleNamespace(outputs=[completion], prompt_logprobs=[None, served({1: -2.125})])
    seen = Comparison()
    seen.add(reference, [0, 1], output)
    assert seen.served == pytest.approx([0.125, 0.5, 0.0], abs=1e-6) and seen.own == [0.25] * 3
    assert (seen.tokens, seen.others, seen.largest_own) == (2, 1, 0.25)


def test_a_tiny_model_on_a_cpu(starts_vllm, nightly, monkeypatch, tmp_path):
    """All three, as far as a CPU has them: engines start, and the tables have their rows."""
    from benchmarks import gpu, gpu_exactness

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    small = dict(SHAPE="yoco-u-kjv", DTYPE="float32", BATCHES=(1, 2), CONTEXTS=(40, 200), STEPS=4)
    for name, value in (small | dict(CHUNKS={"prefill": (64, 128), "decode": (64,)})).items():
        monkeypatch.setattr(gpu, name, value)
    models = gpu.models

    def without_kernels(what, sizes):
        return {name: one for name, one in models(what, sizes).items() if name != KERNELS}

    monkeypatch.setattr(gpu, "models", without_kernels)
    prefill = gpu.measure("prefill", {40: 1, 300: 2}, enforce_eager=True)
    assert [row[1] for row in shown(prefill)] == [in_chunks(64), in_chunks(128), LIKE_PAPER] * 2
    assert prefill.settings["chunks"][in_chunks(64)] == 64
    decode = gpu.measure("decode", {40: 1, 200: 1}, enforce_eager=True)
    assert [row[:3] for row in shown(decode)] == [
        [batch, tokens, model] for batch in (1, 2) for tokens in ("40", "200") for model in (in_chunks(64), LIKE_PAPER)
    ]
    monkeypatch.setattr(gpu_exactness, "RUNS", {("float32", "eager"): dict(enforce_eager=True)})
    (row,) = shown(gpu_exactness.measure())
    assert row[4].startswith("0 of ") and float(row[7].removesuffix("x")) <= 3
    skipped, could = row[-1].split(" of ")
    assert skipped == could != "0"
