"""Prompts of up to a million tokens: which points a model has, and what they follow from."""

import math

import pytest

from benchmarks import render, results
from benchmarks.results import Result
from benchmarks.tables.catalogue import TABLES
from benchmarks.tables.comparisons import LIKE_PAPER, OURS
from benchmarks.tables.long_prompts import draw, note


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)


def measured() -> Result:
    """The Transformer was stopped at 4,096 tokens, and only YOCO-U ran 16,384."""
    settings = dict(shape="57M", sizes="tiny", mode="eager", rounds=3, limit_s=60, dtype="float32 and bfloat16")
    result = Result("long_prompts", "here", settings | dict(chunks={OURS: 1024, LIKE_PAPER: 4096}))
    for dtype, speed in (("float32", 1000), ("bfloat16", 4000)):
        for tokens, factor in ((1024, 1.0), (4096, 0.98), (16384, 0.5)):
            of = dict(tokens=tokens, model=OURS, dtype=dtype)
            result.add("first token", "s", [tokens / speed / factor, 0, math.inf], **of)
            result.add("KV cache", "MiB", tokens / 1024, **of)
        result.add("first token", "s", [1.0], tokens=1024, model=LIKE_PAPER, dtype=dtype)
        for tokens in (1024, 4096):
            result.add("KV cache", "MiB", tokens / 64, tokens=tokens, model=LIKE_PAPER, dtype=dtype)
    return result


def test_speeds_are_compared_with_the_shortest_prompts_of_the_same_type():
    header, lines = TABLES["long_prompts"].whole(measured())
    assert [line[:3] for line in lines[:5]] == [
        ["float32", "1,024", OURS],
        ["float32", "1,024", LIKE_PAPER],
        ["float32", "4,096", OURS],
        ["float32", "4,096", LIKE_PAPER],
        ["float32", "16,384", OURS],
    ]
    assert lines[2][3:] == ["980 (4.2 s)", "0.980", "4.0 MiB"] and lines[3][3:] == ["", "", "64.0 MiB"]
    assert lines[9] == ["bfloat16", "16,384", OURS, "2,000 (8.2 s)", "0.500", "16.0 MiB"]
    assert len(lines) == 10 and all(len(line) == len(header) for line in lines)


def test_the_note_says_what_ran_once_and_what_was_stopped():
    assert "16,384 tokens once" in note(measured()) and "longer than 60 s, which is stopped" in note(measured())


def test_the_picture_has_a_label_for_every_length():
    from matplotlib.figure import Figure

    figure = Figure()
    draw(measured().only("bfloat16"), figure)
    for axes in figure.axes:
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1K", "4K", "16K"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [OURS, LIKE_PAPER]


def test_the_table_on_a_tiny_shape(starts_vllm, nightly, monkeypatch):
    from benchmarks import long_prompts, peers

    small = peers.Sizes("peers", "yoco-u-kjv", "float32", {}, (1,), 0, 1, {})
    monkeypatch.setattr(long_prompts, "SMALL", small)
    monkeypatch.setattr(long_prompts, "LIMIT_S", 0)  # one step is allowed, since time is looked at after it
    result = long_prompts.measure("float32", {100: 2, 700: 1}, longest=5000, rounds=2)
    assert len(result.runs("first token", tokens=100, model=OURS)) == 4
    assert len(result.runs("first token", tokens=700, model=OURS)) == 2
    assert len(result.runs("first token", tokens=5000, model=OURS)) == 1
    assert not result.runs("first token", model=LIKE_PAPER, tokens=100)
    held = [result.median("KV cache", tokens=tokens, model=LIKE_PAPER) for tokens in (100, 700)]
    assert held[1] == pytest.approx(7 * held[0], rel=0.5) and held[0] > 0
    result.save()
    render.draw(result)
    assert render.picture(result).stat().st_size > 10_000
