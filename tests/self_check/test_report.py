"""What the check says of what it has found."""

import json

from vllm_yocou.cli import environment
from vllm_yocou.self_check.check import reason_of
from vllm_yocou.self_check.report import ModelReport, Report

FACTS = {
    "runner": "V1",
    "attention_backends": ["YOCOU_CPU_ATTN"],
    "dtype": "float32",
    "compilation_mode": "NONE",
    "cudagraph_mode": "NONE",
    "tensor_parallel_size": 1,
    "kv_groups": [{"caches": 6, "block": 32, "window": 16}, {"caches": 1, "block": 192, "window": None}],
    "kv_blocks": 21,
    "rows_skip": False,
    "why_not": "skip_rows is off",
}
FIGURES = {"compared": 1200, "largest": 3e-6, "of_bound": 0.25, "cases": {"a case": 3e-6}}


def report(*models: ModelReport, device: str = "cpu") -> Report:
    return Report(environment.describe(), device, list(models))


def test_an_exact_one():
    found = report(ModelReport("one", FACTS, FIGURES), ModelReport("two", FACTS, FIGURES | {"of_bound": 0.5}))
    assert found.is_exact
    assert found.verdict() == (
        "exact: max |Δlogprob| 3.0e-06 in 2,400 log probabilities of 2 models (float32), at most 0.50 of the bound."
    )
    lines = "\n".join(found.models[0].lines())
    assert "6 in blocks of 32 for W = 16, 1 in blocks of 192" in lines
    assert "no row skips: skip_rows is off" in lines


def test_a_wrong_one_names_the_model_and_the_thing():
    found = report(ModelReport("one", FACTS, FIGURES), ModelReport("two", wrong=["no prefix hit happened"]))
    assert not found.is_exact and found.as_json()["exact"] is False
    assert found.verdict() == "wrong: two: no prefix hit happened."
    found.models[0].wrong.append("no prefix hit happened")
    assert found.verdict() == "wrong: one / two: no prefix hit happened."


def test_float32_on_a_gpu_has_a_remedy(monkeypatch):
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    wrong = ModelReport("one", FACTS, FIGURES, wrong=["max |Δlogprob| is 1.0e-02"])
    assert "set TRITON_F32_DEFAULT=ieee" in report(wrong, device="cuda").verdict()
    assert "TRITON" not in report(wrong).verdict()


def test_json_has_no_number_that_it_does_not_know():
    found = report(ModelReport("one", FACTS, FIGURES | {"largest": float("nan")}, wrong=["max |Δlogprob| is nan"]))
    (model,) = json.loads(json.dumps(found.as_json(), allow_nan=False))["models"]
    assert model["figures"]["largest"] == "NaN"


def test_nothing_checked_is_not_exact():
    assert not report().is_exact


def test_the_reason_of_an_error_is_its_last_line():
    pydantic = "1 validation error for VllmConfig\n  Value error, it cannot be. [type=value_error, input_value=1]\n"
    pydantic += "    For further information visit https://errors.pydantic.dev"
    assert reason_of(ValueError(pydantic)) == "it cannot be"
    assert reason_of(RuntimeError("first\nlast.\n")) == "last"
    assert reason_of(KeyError()) == "KeyError"
