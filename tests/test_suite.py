"""The suite itself: which tier a test is in, who runs it, what it leaves to the next one, and what it prints."""

import gc
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import tiers, tiny
from harness.engines import CONTEXT, Engines, generate
from harness.oracle import agrees
from vllm.distributed import model_parallel_is_initialized

pytest_plugins = ["pytester"]
PROMPTS = [tiny.prompt(length) for length in (1, 50)]


def item(*fixtures: str, own: str = "", **parameters) -> SimpleNamespace:
    """As much of a test as its tier and its group follow from; `own` are the parameters that it does not inherit."""
    marks = {"parametrize": [SimpleNamespace(args=(own,))]}
    callspec = SimpleNamespace(params=parameters)
    return SimpleNamespace(
        fixturenames=fixtures, callspec=callspec, iter_markers=marks.__getitem__, path=Path("tests/rows/test_some.py")
    )


@pytest.mark.parametrize(
    "of_test, expected",
    [
        (item("tmp_path"), []),
        (item("engine", "tmp_path"), ["engine"]),
        (item("engine_process", "engine_processes"), ["engine"]),
        (item("server", "client"), ["engine"]),
        (item("starts_vllm", "nightly"), ["engine", "slow"]),
        (item("tmp_path", "nightly"), ["slow"]),
    ],
)
def test_fixtures_decide_the_tier(of_test, expected):
    assert tiers.tiers(of_test) == expected


@pytest.mark.parametrize(
    "of_test, expected",
    [
        (item("tmp_path"), "rows/test_some"),
        (item("tmp_path", "engine"), None),
        (item("interpreted"), None),
        (item("server"), "server"),
        (item("server", "both_cores"), tiers.BOTH_CORES),
        (item("engine_processes"), "runner v1"),
        (item("engine_processes", own="engine_process, skips", engine_process="v2", skips=True), "runner v2"),
        (item("engine_processes", own="settings", settings={"mode": 0}, ran="two-ranks"), tiers.BOTH_CORES),
        (item("module_engine"), "rows/test_some"),
        (item("module_engine", own="name", name="mixed"), "rows/test_some"),
        (item("module_engine", own="name", name="mixed", served="T1"), "rows/test_some T1"),
    ],
)
def test_fixtures_decide_the_group(of_test, expected):
    assert tiers.group(of_test) == expected


def test_engines_are_started_by_fixtures():
    """Otherwise a test's tier would not say that it starts one, and nobody would end it."""
    modules = [path for path in Path(__file__).parent.rglob("test_*.py") if path != Path(__file__)]
    assert modules and not [path for path in modules if re.search(r"\bLLM\(", path.read_text())]


def test_figures_of_every_worker_are_printed(pytester, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    module = "from harness import figures\ndef test_{}(): figures.note({}, 7, 1e-7)"
    pytester.makepyfile(test_a=module.format("a", "1e-6"), test_b=module.format("b", "2e-6"))
    printed = pytester.runpytest_subprocess("-p", "harness.figures", "-n", "2", "--dist", "loadgroup").stdout
    printed.fnmatch_lines(["*served model against the reference*", "*1.0e-06 of *test_a*", "*2.0e-06 of *test_b*"])


def test_a_group_reaches_the_scheduler(pytester):
    """pytest-xdist knows a group by the end of a test's id; pytest 9.2 builds ids anew, and every group falls apart."""
    pytester.makepyfile("import pytest\n@pytest.mark.xdist_group('together')\ndef test_a(): pass")
    printed = pytester.runpytest_subprocess("-n", "1", "--dist", "loadgroup", "-v").stdout
    printed.fnmatch_lines(["*::test_a@together*"])


def test_a_failed_start_leaves_nothing_to_the_next(engine, tmp_path):
    model = tiny.model(tiny.config(qk_norm="self"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing: "):
        engine(tmp_path, hf_overrides={"qk_norm": "all"})
    assert not model_parallel_is_initialized()
    agrees(model, PROMPTS, generate(engine(tmp_path), PROMPTS))


def test_a_start_that_fails_late_leaves_nothing_to_the_next(engine, tmp_path):
    """After its engine core has begun: a pooling model asks for its tokenizer at the very end."""
    model = tiny.model(tiny.config())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Tokenizer not available") as held:
        engine(tmp_path, runner="pooling", max_num_batched_tokens=CONTEXT)
    llm = engine(tmp_path)
    del held  # as a report of a failed test does, while the next one runs
    gc.unfreeze()
    gc.collect()
    agrees(model, PROMPTS, generate(llm, PROMPTS))


def test_an_engine_that_is_collected_late_takes_nothing_with_it(engine, tmp_path):
    """As when the frames of a failed test have held it."""
    model = tiny.model(tiny.config())
    model.save_pretrained(tmp_path)
    before = Engines()
    held = before(tmp_path)
    before.stop()
    llm, alive = engine(tmp_path), weakref.ref(held.llm_engine.engine_core)
    # What ends an engine when it is collected is its client.
    held.llm_engine.engine_core = None
    gc.unfreeze()  # vLLM has frozen all that was there
    gc.collect()
    assert alive() is None
    agrees(model, PROMPTS, generate(llm, PROMPTS))
