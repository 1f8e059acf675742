"""Results as files, the READMEs that are rendered from them, and the help page: nothing here starts an engine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.checkout import ROOT

from benchmarks import render, results
from benchmarks.results import Result
from benchmarks.tables.catalogue import GROUPS, TABLES
from benchmarks.tables.comparisons import LIKE_PAPER, OURS
from benchmarks.tables.gpu import COMPARED, EVERY_ROW, GREEDY, OTHERS, SKIPPING, in_chunks
from benchmarks.tables.quality import SCORES

XEON, EPYC = "2 cores of Intel(R) Xeon(R) Processor @ 2.80GHz", "2 cores of AMD EPYC"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where results are kept, instead of the repository's."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(render, "FOLDER", tmp_path / "results")
    return tmp_path


@pytest.fixture
def page(folder, monkeypatch) -> Path:
    """The only page, with a block for chunk_size."""
    page = folder / "README.md"
    page.write_text("before\n\n<!-- results: chunk_size -->\n<!-- end -->\n\nafter\n")
    monkeypatch.setattr(render, "PAGES", (page,))
    monkeypatch.setattr(render, "ROOT", folder)
    return page


def chunks(machine: str, seconds: dict[int, list[float]]) -> Result:
    settings = dict(shape="57M", dtype="float32", tokens=64, rounds=3)
    result = Result("chunk_size", machine, settings, date="2026-11-26", commit="0123456789ab")
    for chunk, runs in seconds.items():
        result.add("prefill", "s", runs, chunk=chunk)
        result.add("KV cache held at most", "MiB", [chunk / 8] * len(runs), chunk=chunk)
    return result


def t_sweep(machine: str) -> Result:
    settings = dict(parameters=3_000_000, training_tokens=4096, dtype="float32", prompt=64, batch=8)
    result = Result("t_sweep", machine, settings)
    for t in (1, 3):
        result.add("held-out perplexity", "", 40.0 + t, T=t)
        result.add("first token", "s", [0.5 * t], T=t)
        result.add("decode step", "s", [0.01 * t], T=t)
        result.add("KV cache", "MiB", t, T=t)
    return result


def test_a_result_is_read_as_it_was_written(folder):
    result = chunks(XEON, {512: [1.25, 1.0, 1.5], 1024: [2, 1 / 3]})
    result.environment = {"versions": {"vllm": "0.32.0+cpu"}, "processor": {"features": ["avx2"]}}
    result.transcribed, result.remark = True, "Read from a page."
    path = result.save()
    assert path == folder / "results" / "2-cores-intel-xeon-2.80ghz" / "chunk_size.json"
    again = Result.load(path)
    assert again == result and again.runs("prefill", chunk=1024) == [2, 0.333333333]
    assert json.loads(path.read_text())["measurements"][0] == {
        "name": "prefill",
        "unit": "s",
        "of": {"chunk": 512},
        "runs": [1.25, 1.0, 1.5],
    }


def test_figures_of_a_result():
    result = chunks(XEON, {512: [1.25, 1.0, 3.0], 1024: [2.0]})
    assert (result.median("prefill", chunk=512), result.mean("prefill", chunk=512)) == (1.25, 1.75)
    assert result.median("prefill", chunk=2048) is None and result.runs("nothing") == []
    assert result.keys("chunk") == [512, 1024] and result.keys("chunk", "nothing") == []
    with pytest.raises(LookupError, match=r"chunk_size has 2 measurements of prefill with \{\}: name more keys"):
        result.runs("prefill")


def test_a_transcribed_result_keeps_printed_ratios():
    """Printed seconds are rounded: their ratio is not the printed ratio."""
    result = chunks(XEON, {512: [0.7], 1024: [0.5]})
    assert result.derived("speed", 0.7 / 0.5, chunk=1024) == 1.4
    result.transcribed = True
    assert result.derived("speed", 0.7 / 0.5, chunk=1024) is None
    result.add("speed", "x", 1.38, chunk=1024)
    assert result.derived("speed", 0.7 / 0.5, chunk=1024) == 1.38


@pytest.mark.parametrize(
    "gpus, name, machine, slug",
    [
        ([], "AMD EPYC", EPYC, "2-cores-amd-epyc"),
        (
            [],
            "Intel(R) Xeon(R) Processor @ 2.80GHz",
            XEON,
            "2-cores-intel-xeon-2.80ghz",
        ),
        ([], "Intel(R) Xeon(R) CPU @ 2GHz", "2 cores of Intel(R) Xeon(R) CPU @ 2GHz", "2-cores-intel-xeon-2ghz"),
        ([], "", "2 cores of aarch64", "2-cores-aarch64"),
        (["NVIDIA H100 80GB HBM3"], "AMD EPYC", "NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_machines(gpus, name, machine, slug):
    described = {"platform": {"gpus": gpus, "machine": "aarch64"}, "processor": {"name": name, "cores": 2}}
    assert results.machine(described) == machine and results.slug(machine) == slug


def test_a_result_of_this_machine(monkeypatch):
    from vllm_yocou.cli import environment

    result = Result.here("chunk_size", shape="57M")
    described = environment.describe()
    assert result.environment == described and json.loads(json.dumps(described)) == described
    assert result.machine == results.machine(described) and result.settings == {"shape": "57M"}
    assert len(result.date) == len("2026-11-26") and not result.transcribed


def test_two_machines_stand_next_to_each_other(page):
    chunks(XEON, {512: [1.0, 2.0, 9.0], 1024: [4.0]}).save()
    chunks(EPYC, {512: [0.5, 0.25, 0.75], 1024: [1.0]}).save()
    assert render.write() == [page]
    first, second = page.read_text().split("**2 cores of Intel")
    assert first.startswith("before\n\n<!-- results: chunk_size -->\n\n**2 cores of AMD EPYC**")
    assert "| 512 | 64.0 MiB | 0.50 s | 2.00x |\n| 1024 | 128.0 MiB | 1.00 s | 1.00x |" in first
    assert "| 512 | 64.0 MiB | 2.00 s | 2.00x |\n| 1024 | 128.0 MiB | 4.00 s | 1.00x |" in second
    assert second.endswith("\n\n<!-- end -->\n\nafter\n")
    assert render.write() == [] and render.mistakes() == []


def test_an_empty_column_is_left_out():
    assert render.markdown(["a", "b", "c"], [[1, "", 2], [3, "", ""]]) == "| a | c |\n|---|---|\n| 1 | 2 |\n| 3 |  |"
    with pytest.raises(ValueError, match="2 cells under 1 headings"):
        render.markdown(["a"], [[1, 2]])


def test_a_pasted_number_is_seen(page):
    chunks(XEON, {512: [1.0], 1024: [4.0]}).save()
    render.write()
    page.write_text(page.read_text().replace("4.00 s", "3.00 s"))
    assert render.mistakes() == ["README.md differs from what it is rendered from."]


def test_a_changed_result_is_seen(page):
    result = chunks(XEON, {512: [1.0], 1024: [4.0]})
    result.save()
    render.write()
    result.measurements[0].runs[0] = 1.5
    result.save()
    assert render.mistakes() == ["README.md differs from what it is rendered from."]


def test_a_picture_of_another_result_is_seen(page):
    page.write_text("<!-- results: t_sweep -->\n<!-- end -->\n")
    result = t_sweep(XEON)
    path = result.save()
    assert render.write() == [page, path.with_suffix(".png")] and render.mistakes() == []
    assert "(results/2-cores-intel-xeon-2.80ghz/t_sweep.png)" in page.read_text()
    result.commit = "fedcba987654"
    result.save()
    render.PAGES[0].write_text(render.rendered(page))
    assert render.mistakes() == [f"t_sweep.png of {XEON} shows another result."]


def test_a_page_of_another_folder_links_to_the_picture(page, monkeypatch):
    guide = page.parent / "docs" / "guide.md"
    guide.parent.mkdir()
    guide.write_text("<!-- results: t_sweep -->\n<!-- end -->\n")
    monkeypatch.setattr(render, "PAGES", (guide,))
    t_sweep(XEON).save()
    render.write()
    link = "../results/2-cores-intel-xeon-2.80ghz/t_sweep.png"
    assert f"]({link})" in guide.read_text() and (guide.parent / link).exists()


def test_a_result_that_no_page_shows_is_seen(page):
    t_sweep(XEON).save()
    render.write()
    assert render.mistakes() == ["no page has a block for the results of t_sweep."]


def test_a_block_of_no_table_is_refused(page):
    page.write_text("<!-- results: speed -->\n<!-- end -->\n")
    with pytest.raises(LookupError, match=r"README.md has a block of results 'speed', which is not a table"):
        render.write()


@pytest.mark.parametrize("rest", ["", "\n<!-- results: prefill -->\n<!-- end -->\n"])
def test_a_block_without_an_end_is_refused(page, rest):
    page.write_text(f"<!-- results: chunk_size -->\n| 1 |\n{rest}")
    with pytest.raises(LookupError, match="has a block of results without a line '<!-- end -->'"):
        render.write()


def test_a_marker_within_a_sentence_is_not_a_block(page):
    page.write_text("Tables stand between `<!-- results: speed -->` and `<!-- end -->`.\n")
    assert render.write() == []


def test_the_pages_follow_from_the_results():
    """A number that was pasted into a table of the READMEs fails here: `python -m benchmarks render` puts it right."""
    assert render.mistakes() == []
    nowhere_yet = {"peers_paper", "gpu_speed"}
    assert {result.table for result in render.results()} >= set(TABLES) - nowhere_yet


def test_the_promises_of_the_front_page_follow_from_the_results():
    text = " ".join((ROOT / "README.md").read_text().split())
    newest = max(Result.all_of("peers"), key=lambda result: result.date).only("float32")
    ours, theirs = (newest.median("KV cache", tokens=16384, model=model) for model in (OURS, LIKE_PAPER))
    assert f"16,384 tokens holds {ours:.1f} MiB, where a Transformer of the same depth holds {theirs:.1f} MiB" in text
    first = Result.all_of("gpu_prefill")[0]
    longest = 256 << 10
    ours_s = first.median("first token", tokens=longest, model=in_chunks(8192), way=SKIPPING)
    theirs_s = first.median("first token", tokens=longest, model=LIKE_PAPER, way=EVERY_ROW)
    assert f"{longest / ours_s:,.0f} prompt tokens a second at 256K tokens, {theirs_s / ours_s:.2f} times" in text
    exact = [one for one in Result.all_of("gpu_exactness")[0].measurements if one.of["dtype"] == "float32"]
    wrong, tokens = (sum(sum(one.runs) for one in exact if one.name == name) for name in (OTHERS, GREEDY))
    assert f"In float32 on an H100, {wrong} of {tokens:,} greedy tokens differ" in text


def test_results_are_kept_under_their_own_names():
    for path in sorted(results.FOLDER.glob("*/*.json")):
        assert Result.load(path).path == path


TIMES = {"s", "ms", "us", "1/s"}
SIZES = {"bytes", "MiB", "bytes/us"}
COUNTS = {"tokens", "rows", "groups", "texts", "requests", "preemptions", "calls", "changes"}
UNITS = TIMES | SIZES | COUNTS | {"nats", "x"}
# Perplexities, scores and shares, and how many log probabilities were compared.
PURE = {"held-out perplexity", "score", *SCORES, "share", "Python and dispatch, share", COMPARED}
PURE |= {"reached, by time", "reached, by FLOPs", "largest |r - 1|", "tokens with other experts"}


def without_unit(result: Result) -> list[str]:
    """Names of measurements whose unit is unknown, missing, or given to a pure number."""
    return [one.name for one in result.measurements if (one.unit not in UNITS) != (one.unit == "" and one.name in PURE)]


@pytest.mark.parametrize(
    "path", sorted(results.FOLDER.glob("*/*.json")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_value_has_a_unit_or_is_a_pure_number(path):
    result = Result.load(path)
    assert result.measurements and all(one.runs for one in result.measurements)
    assert not without_unit(result)


@pytest.mark.parametrize("name, unit", [("prefill", ""), ("prefill", "seconds"), ("score", "points")])
def test_a_value_without_its_unit_is_seen(name, unit):
    result = chunks(XEON, {512: [1.0]})
    result.add("score", "", 0.5)
    assert not without_unit(result)
    result.add(name, unit, 1.0)
    assert without_unit(result) == [name]


def test_every_result_says_where_it_is_from():
    """A transcribed one says so in a sentence; a measured one names its GPU or processor."""
    for result in render.results():
        assert result.commit and result.date
        if result.commit.endswith("-changed"):
            assert f"The tree was {result.commit.removesuffix('-changed')} with" in result.remark, result.path
        if result.transcribed:
            assert result.remark.endswith(".") and "individual runs were not kept" in result.remark
        else:
            assert result.environment["versions"]["vllm"] and result.machine == results.machine(result.environment)
            assert result.environment["platform"]["gpus"] or result.environment["processor"]["features"]


def benchmarks(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PATH": "", "COLUMNS": "400"})


def test_the_help_page_says_of_every_table_what_it_needs_and_how_long_it_takes():
    page = benchmarks("--help").stdout
    lines = {line.split()[1]: line for line in page.splitlines() if len(line.split()) > 2}
    for table in TABLES.values():
        assert table.needs and table.takes
        takes = f"{table.takes} for each type" if table.each_dtype else table.takes
        assert f"Needs: {table.needs}. Time: {takes}." in lines[table.name]
    assert "--check" not in page and all(group in page for group in GROUPS)


def test_a_table_of_every_module_and_a_module_of_every_table():
    for table in TABLES.values():
        assert (ROOT / "benchmarks" / f"{table.module or table.name}.py").exists()


def test_rendering_imports_no_torch():
    code = "import sys, benchmarks.__main__; sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["prefill", "nothing"], "nothing: not a table: choose from kv_layout,"),
        (["prefill", "peers", "--paper"], "--paper: not a table: choose from kv_layout,"),
    ],
)
def test_tables_that_are_not_there(words, sentence):
    ended = benchmarks(*words)
    assert ended.returncode == 1 and ended.stderr.startswith(sentence)


def test_a_word_that_is_not_a_table():
    ended = benchmarks("nothing", "peers")
    assert ended.returncode == 2 and "No such command 'nothing'" in ended.stderr


NOISE = "import sys; print('vLLM warns'); print('engine dies', file=sys.stderr)\n"
QUIET = """
from benchmarks import console, results
from benchmarks.results import Result
from pathlib import Path
results.FOLDER = Path(sys.argv[1])
console.progress("round 1")
result = Result("chunk_size", "m", dict(shape="57M", dtype="float32", tokens=64, rounds=1))
result.add("prefill", "s", [1.5], chunk=512)
console.publish(result)
"""


@pytest.mark.parametrize("code", [0, 3])
def test_a_table_that_succeeds_writes_only_progress_lines(tmp_path, capfd, monkeypatch, code):
    """What its process prints is shown when it fails, and only then."""
    from benchmarks import console

    (tmp_path / "noisy.py").write_text(f"{NOISE}{QUIET if code == 0 else ''}sys.exit({code})\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    # pytest's own sys.stderr has no descriptor that another process could write to.
    with open(tmp_path / "seen", "w") as seen, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", seen)
        assert console.run("chunk_size", ["noisy", str(tmp_path)]) is (code == 0)
    lines = (tmp_path / "seen").read_text().splitlines()
    printed = capfd.readouterr().out
    if code == 0:
        progress, kept = lines
        assert progress == "round 1"
        assert re.fullmatch(rf"chunk_size: \d+ s, kept in {re.escape(str(tmp_path))}/m/chunk_size.json", kept)
        assert printed.startswith("\n### chunk_size\n\n**m**")
        assert "| 512 | 1.50 s | 1.00x |" in printed
    else:
        assert lines == [
            "vLLM warns",
            "engine dies",
            "chunk_size: failed with exit code 3; above are the last lines of its log.",
        ]
        assert not printed
