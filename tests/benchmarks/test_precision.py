"""Tables that are measured in each type: which types a processor has, and how the parts stand side by side."""

from dataclasses import replace

import pytest

from benchmarks import precision, results
from benchmarks.results import Result
from benchmarks.tables.catalogue import TABLES
from vllm_yocou.cli import environment


@pytest.mark.parametrize(
    "features, dtypes",
    [
        (["avx2", "avx512f"], ["float32"]),
        (["avx512_bf16"], ["float32", "bfloat16"]),
        (["amx_bf16"], ["float32", "bfloat16"]),
    ],
)
def test_bfloat16_is_measured_where_the_processor_has_it(features, dtypes, monkeypatch):
    monkeypatch.setattr(environment, "describe", lambda: {"processor": {"features": features}})
    assert precision.dtypes_here() == dtypes


def of_type(dtype: str) -> Result:
    result = Result("chunk_size", "here", dict(shape="57M", dtype=dtype, tokens=1000, rounds=1))
    result.add("prefill", "s", 2.0 if dtype == "float32" else 1.0, chunk=512)
    result.add("KV cache held at most", "MiB", 8, chunk=512)
    return result


@pytest.fixture
def both(tmp_path, monkeypatch) -> Result:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(precision, "dtypes_here", lambda: ["float32", "bfloat16"])
    return precision.in_each_dtype(of_type)


def test_each_type_has_its_own_rows(both):
    table = TABLES["chunk_size"]
    _, (one,) = table.rows(of_type("float32"))
    header, lines = table.whole(both)
    assert [line[0] for line in lines] == ["float32", "bfloat16"] and lines[0][1:] == one
    assert all(len(line) == len(header) for line in lines)
    assert "float32 and bfloat16" in table.note(both)


def test_a_part_is_as_if_nothing_else_had_been_measured(both):
    part, alone = both.only("bfloat16"), of_type("bfloat16")
    assert replace(part, environment={}, commit="", date="") == alone


def test_results_of_one_type_have_no_column_for_it():
    result = of_type("float32")
    assert TABLES["chunk_size"].whole(result) == TABLES["chunk_size"].rows(result)


def test_what_is_done_is_kept_if_the_rest_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(precision, "dtypes_here", lambda: ["float32", "bfloat16"])

    def cut(dtype: str) -> Result:
        if dtype == "bfloat16":
            raise KeyboardInterrupt
        return of_type(dtype)

    with pytest.raises(KeyboardInterrupt):
        precision.in_each_dtype(cut)
    (path,) = tmp_path.glob("*/chunk_size.json")
    assert Result.load(path).only("float32").runs("prefill", chunk=512) == [2.0]
