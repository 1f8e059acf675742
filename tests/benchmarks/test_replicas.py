"""Batch inference by replicas: what is counted, and that no row is lost."""

import json

from benchmarks.results import Result
from benchmarks.tables.replicas import rows


def test_replicas_are_compared_with_one():
    result = Result("replicas", "", {})
    for replicas, speed in ((1, 100), (2, 150)):
        result.add("answers", "1/s", [speed, 0, 1000], replicas=replicas)
        result.add("rows lost", "rows", 0, replicas=replicas)
        result.add("rows doubled", "rows", replicas, replicas=replicas)
    assert rows(result)[1] == [[1, "100", "1.00x", "0", "1"], [2, "150", "1.50x", "0", "2"]]


def test_a_row_that_is_missing_or_there_twice_is_counted(tmp_path, monkeypatch):
    from benchmarks import replicas

    monkeypatch.setattr(replicas, "ROWS", 4)
    run = object.__new__(replicas.Run)  # without the process
    run.answers = tmp_path
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": f"row-{i}"}) + "\n" for i in (0, 1, 1)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "row-3"}) + "\n")
    assert run.lost_and_doubled() == (1, 1)


def test_the_table_on_few_rows(starts_vllm, both_cores, nightly, monkeypatch):
    from benchmarks import replicas

    engine = replicas.ENGINE | dict(enforce_eager=True)
    for name, value in dict(REPLICAS=(2,), ROWS=96, TOKENS=24, BATCH=8, ROUNDS=1, ENGINE=engine).items():
        monkeypatch.setattr(replicas, name, value)
    result = replicas.measure()
    assert result.median("rows lost", replicas=2) == result.median("rows doubled", replicas=2) == 0
    assert result.median("answers", replicas=2) > 0
