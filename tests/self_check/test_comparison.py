"""What passes for exact: answers of the reference itself do, and damaged ones are named."""

import pytest
import torch
from harness import tiny

from vllm_yocou.self_check.comparison import Answer, Comparison, Reference, rms

CASE = "a case"
MODEL = tiny.model(tiny.config())


def answer(model, prompt: list[int], tokens: int = 6) -> Answer:
    """What a server would answer that computes as `model` does, with log probabilities of all tokens."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        rows = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    rows = [dict(enumerate(row.tolist())) for row in rows]
    return Answer(prompt, ids[len(prompt) :], rows[len(prompt) - 1 : -1], [None, *rows[: len(prompt) - 1]])


def compared(served: Answer, dtype: torch.dtype = torch.float32) -> Comparison:
    comparison = Comparison(Reference(tiny.model(tiny.config()).to(dtype)))
    comparison.add(CASE, served)
    return comparison


def shifted(served: Answer, by: float) -> Answer:
    """All log probabilities, moved."""

    def moved(row: dict[int, float] | None) -> dict[int, float] | None:
        return row and {token: logprob + by for token, logprob in row.items()}

    return Answer(
        served.prompt, served.tokens, list(map(moved, served.logprobs)), list(map(moved, served.prompt_logprobs))
    )


def test_the_references_own_answers_are_exact():
    comparison = compared(answer(MODEL, tiny.prompt(30)))
    figures = comparison.figures()
    assert comparison.wrong() == []
    assert figures["compared"] == (29 + 6) * tiny.VOCABULARY
    assert figures["of_bound"] == figures["largest"] == 0 < figures["bound"] < 1e-4


@pytest.mark.parametrize("scored", [True, False])
def test_one_shifted_log_probability_is_named(scored):
    served = answer(MODEL, tiny.prompt(30))
    row = served.prompt_logprobs[17] if scored else served.logprobs[3]
    row[5] += 1e-3
    (complaint,) = compared(served).wrong()
    assert "max |Δlogprob| is 1.0e-03" in complaint and CASE in complaint


def test_another_greedy_token_is_named():
    served = answer(MODEL, tiny.prompt(30))
    row = served.logprobs[-1]
    best, second = sorted(row, key=row.get)[-1:-3:-1]
    assert served.tokens[-1] == best and row[best] - row[second] > 1e-3
    served.tokens[-1] = second
    (complaint,) = compared(served).wrong()
    assert "a greedy token" in complaint and CASE in complaint


def test_what_is_not_a_number_is_never_exact():
    served = answer(MODEL, tiny.prompt(30))
    served.prompt_logprobs[17][5] = float("nan")
    assert len(compared(served).wrong()) == 1


def test_nothing_compared_is_not_exact():
    assert Comparison(Reference(MODEL)).wrong()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_dtype_may_err_by_one_and_a_half_times_the_references_own_error(dtype):
    """Shifting all truths by x makes the served RMS x: just within and just beyond the bound, both of one reference."""
    rounded = tiny.model(tiny.config()).to(dtype)
    truth = answer(rounded.double(), tiny.prompt(30))
    # The double truth of these tests goes through float32, which is nothing next to half precision.
    own = rms(compared(truth, dtype).own)
    assert own > 1e-4
    assert compared(shifted(truth, 1.4 * own), dtype).wrong() == []
    (complaint,) = compared(shifted(truth, 1.6 * own), dtype).wrong()
    assert "the RMS of Δlogprob" in complaint


def test_a_model_in_bfloat16_is_as_exact_as_the_reference_in_bfloat16():
    comparison = compared(answer(tiny.model(tiny.config()).bfloat16(), tiny.prompt(30)), torch.bfloat16)
    assert comparison.wrong() == []
    assert comparison.figures()["of_bound"] == pytest.approx(1 / 1.5)


@pytest.mark.parametrize("shifted_rows, exact", [(8, True), (30, False)])
def test_another_expert_in_a_few_rows_is_not_wrong(shifted_rows, exact):
    """A near tie between experts, which any rounding decides anew, moves rows of a prompt by far more than rounding."""
    rounded = tiny.model(tiny.moe_config()).bfloat16()
    served = answer(rounded, tiny.prompt(30))
    for row in served.prompt_logprobs[1:shifted_rows]:
        for token in row:
            row[token] += 1
    comparison = Comparison(Reference(rounded))
    comparison.add(CASE, served)
    wrong = comparison.wrong()
    assert not wrong if exact else "the median of Δlogprob" in wrong[0]
