"""The benchmarks on tiny shapes: that they run, and that what they print follows from what they measured."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from checkout import ROOT, TRAINED


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """What benchmarks.engine sets on import stays in this module: a server's log has to say when it is ready."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_LOGGING_LEVEL", os.environ.get("VLLM_LOGGING_LEVEL", "INFO"))
        yield


def rows(text: str) -> list[list[str]]:
    """Cells of the lines below a Markdown table's header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def number(cell: str) -> float:
    return float(re.match(r"[\d.,]+", cell)[0].replace(",", ""))


def test_peers(monkeypatch, tmp_path, capsys):
    from benchmarks import peers

    lengths, batches = (100, 2000), (1, 2)
    small = peers.Sizes("yoco-u-kjv", "float32", dict.fromkeys(lengths, 1), batches, 1 << 30, {})
    for name, value in dict(SMALL=small, CHUNK=128, ROUNDS=1, PICTURE=tmp_path / "pictures" / "peers.png").items():
        monkeypatch.setattr(peers, name, value)
    peers.main([])
    printed = capsys.readouterr().out
    assert f"{peers.OURS} 2, " in printed and "a group for each cache 10, " in printed
    table = rows(printed)
    names = list(peers.peers(small))
    assert [(number(row[0]), row[1]) for row in table] == [(tokens, name) for tokens in lengths for name in names]
    for row in table:
        ours = next(other for other in table if other[:2] == [row[0], peers.OURS])
        for figure in (2, 4, 6):
            both = number(ours[figure]) / number(row[figure])
            assert number(row[figure + 1]) == pytest.approx(both, rel=0.05, abs=0.01)
        assert number(row[9]) == pytest.approx(number(ours[8]) / number(row[8]), rel=0.1, abs=0.1)
    # 2000 tokens: a global cache and nine windows of 64 tokens and of a chunk, beside 6 and 12 caches of all tokens.
    kv = {row[1]: number(row[8]) for row in table if number(row[0]) == 2000}
    assert kv[peers.OURS] < kv[peers.LIKE_PAPER] / 2 < kv["Transformer, S·T + C layers"] / 3
    assert peers.PICTURE.stat().st_size > 10_000


def test_ratios_of_peers_name_the_papers():
    from benchmarks.peers import LIKE_PAPER, OURS, Sizes, table

    tokens = 16 << 10
    sizes = Sizes("", "", {tokens: 1}, (1, 8), 0, {})
    steps = {(tokens, 1): {OURS: 0.5, LIKE_PAPER: 0.25}, (tokens, 8): {OURS: 1.0}}
    held = {tokens: {OURS: 1 << 20, LIKE_PAPER: 4 << 20}}
    ours, theirs = table([OURS, LIKE_PAPER], sizes, {tokens: {OURS: 4.0, LIKE_PAPER: 8.0}}, steps, held)
    assert ours[2:] == ["4,096 (4.00 s)", "1.00x", "2.0", "1.00x", "8.0", "1.00x", "1.0 MiB", "1.00x", 1024]
    # SPEC.md, section 5: 75,694 tokens/s of prefill beside 66,342, 62 MB beside 640.
    assert theirs[2:5] == ["2,048 (8.00 s)", "2.00x (paper 1.14x)", "4.0"]
    assert theirs[5:] == ["0.50x", "does not fit", "", "4.0 MiB", "0.25x (paper 0.10x)", 256]


def test_reference_model(monkeypatch, capsys):
    from benchmarks import reference_model

    for name, value in dict(SHAPE="yoco-u-kjv", PROMPTS=(70,), BATCHES=(1, 2), STEPS=3, ROUNDS=1).items():
        monkeypatch.setattr(reference_model, name, value)
    reference_model.main()
    table = rows(capsys.readouterr().out)
    assert [row[:2] for row in table] == [["70", "1"], ["70", "2"]]
    for row in table:
        assert number(row[7]) == pytest.approx(number(row[6]) / number(row[5]), rel=0.05, abs=0.01)


def test_t_sweep(monkeypatch, tmp_path, capsys):
    """Checkpoints that are there are not trained again: here the trained one, which 3 and 1 iterations share."""
    from benchmarks import t_sweep

    report = json.loads((TRAINED / "training.json").read_text())
    for t in (1, 3):
        folder = shutil.copytree(TRAINED, tmp_path / f"T{t}-7")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_iterations": t}))
        held_out = {"held_out_perplexity": {f"YOCO-U, T = {t}": 40.0 + t}}
        (folder / "training.json").write_text(json.dumps(report | held_out))
    settings = dict(ITERATIONS=(1, 3), PROMPT=200, BATCH=2, ROUNDS=1, STEPS=2, PICTURE=tmp_path / "t_sweep.png")
    for name, value in settings.items():
        monkeypatch.setattr(t_sweep, name, value)
    monkeypatch.setattr("sys.argv", ["t_sweep", "--corpus", "none", "--steps", "7", "--keep", str(tmp_path)])
    t_sweep.main()
    (one, three) = rows(capsys.readouterr().out)
    assert [one[0], one[1], three[0], three[1]] == ["1", "41.0", "3", "43.0"]
    assert "(1.00x)" in one[4] and number(three[4]) > 1.5 * number(one[4])
    assert t_sweep.PICTURE.stat().st_size > 5_000


def test_answers_are_compared():
    from benchmarks.evaluation import alike

    assert alike([[-1.0, -2.0], [-3.0]], [[-1.0, -2.25], [-3.0]]) == "log-likelihoods within 2.5e-01"
    assert alike([["a"], ["b"]], [["a"], ["c"]]) == "1 of 2 texts the same"
    with pytest.raises(ValueError):
        alike([["a"], ["b"]], [["a"]])


def test_healing(tmp_path):
    from benchmarks.healing import Made, table

    report = {"held_out_perplexity": {"before": 900.0, "after": 90.0, "source": 30.0}}
    made = {2: Made(tmp_path / "start", tmp_path / "healed", report)}
    found = {tmp_path: [0.625, 0.5, 1.0], tmp_path / "start": [0.5, 0.5, 0.0], tmp_path / "healed": [0.6, 0.5, 0.25]}
    costs = [(180 << 20, 0.1), (18 << 20, 0.2)]
    assert table(made, found, tmp_path, costs) == [
        ["the source", "", "30.0", "0.625", "0.500", "1.000", "180.0 MiB (1.0x)", "10.0 (1.00x)"],
        ["after initialisation", 2, "900.0", "0.500", "0.500", "0.000", "18.0 MiB (10.0x)", "5.0 (0.50x)"],
        ["after healing", 2, "90.0", "0.600", "0.500", "0.250", "18.0 MiB (10.0x)", "5.0 (0.50x)"],
    ]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nothing", "peers"], "nothing: no table, choose from kv_layout,"),
        (["--paper", "serving"], "serving: no table with --paper, choose from peers."),
    ],
)
def test_tables_that_are_not_there(arguments, sentence):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith(sentence)
