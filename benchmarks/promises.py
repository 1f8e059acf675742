"""Each promise that the soak checks is a function that raises `Mistake`; a report counts the mistakes."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Result
from benchmarks.tables.quality import SENT
from vllm_yocou.reference import YocoUForCausalLM

MARGIN = 1e-3  # where the reference's two best logits are closer, either token is right (tests/harness/oracle.py)
TOLERANCE = 1e-3  # |Δlogprob|, as in tests/serving/test_server.py
GROWTH = 0.02


class Mistake(Exception):
    """A promise that was not kept: which one, and how it was seen."""

    def __init__(self, promise: str, seen: str):
        super().__init__(promise, seen)


@dataclass(frozen=True)
class Expected:
    """What the reference model says of one prompt: its continuation, and log P of every prompt token but the first."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


class Reference:
    def __init__(self, checkpoint: Path):
        self.model = YocoUForCausalLM.from_pretrained(str(checkpoint), dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """(N, vocab_size)."""
        return self.model(torch.tensor([token_ids])).logits[0]

    def expect(self, prompt: list[int], tokens: int) -> Expected:
        ids = torch.tensor([prompt])
        # Without a mask of its own generate() would take a leading <|endoftext|> for padding.
        settings = dict(attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0)
        output = self.model.generate(ids, max_new_tokens=tokens, **settings)
        rows = self.logits(prompt)[:-1].log_softmax(-1)
        return Expected(prompt, output[0, len(prompt) :].tolist(), rows.gather(-1, ids[0, 1:, None])[:, 0].tolist())

    def check_tokens(self, expected: Expected, served: list[int]) -> None:
        """Raise Mistake unless `served` is a greedy continuation: the expected one, or another after a near tie."""
        if served == expected.tokens[: len(served)]:
            return
        rows = self.logits([*expected.prompt, *served])[len(expected.prompt) - 1 : -1]
        best, second = rows.topk(2).values.unbind(-1)
        wrong = (rows.argmax(-1) != torch.tensor(served)) & (best - second > MARGIN)
        if wrong.any():
            step = int(wrong.int().argmax())
            raise Mistake(
                "greedy answers are the reference's",
                f"token {step} after a prompt of {len(expected.prompt)} is {served[step]} instead of "
                f"{rows[step].argmax().item()}",
            )


def check_logprobs(expected: Expected, served: list[Any]) -> None:
    """`served` is vLLM's prompt_logprobs: None, then {token: {"logprob": float}} for each further prompt token."""
    promise = "prompt log probabilities are the reference's"
    if len(served) != len(expected.prompt):
        raise Mistake(promise, f"{len(served)} of them for a prompt of {len(expected.prompt)}")
    for position, (token, value) in enumerate(zip(expected.prompt[1:], expected.logprobs, strict=True), start=1):
        given = served[position][str(token)]["logprob"]
        if not abs(given - value) < TOLERANCE:
            raise Mistake(promise, f"{given:.4f} instead of {value:.4f} at {position} of {len(expected.prompt)}")


def check_refusal(status: int, body: str, word: str) -> None:
    promise = "bad requests are answered 4xx with a sentence"
    if not 400 <= status < 500:
        raise Mistake(promise, f"status {status} where {word!r} is wrong")
    try:
        message = json.loads(body)["error"]["message"]
        names_it = word in message and len(message.split()) > 2
    except (ValueError, LookupError, TypeError):
        names_it = False
    if not names_it:
        raise Mistake(promise, f"{body[:80]!r} where {word!r} is wrong")


def check_usage(start: float, end: float) -> None:
    if end != start:
        raise Mistake("no KV block is leaked", f"usage of the idle server went from {start} to {end}")


def check_growth(warm: int, end: int) -> None:
    """Bytes of the idle server after warm-up and at the end."""
    if end >= warm * (1 + GROWTH):
        raise Mistake(f"memory grows by less than {GROWTH:.0%}", f"{warm / 2**20:.0f} MiB became {end / 2**20:.0f} MiB")


def check_preemptions(count: float) -> None:
    if count <= 0:
        raise Mistake("requests are preempted", "there was room for all of them, so this load proves nothing")


@dataclass
class Report:
    """Requests by kind: sent, answered, ended by the client; tokens compared; mistakes."""

    sent: Counter = field(default_factory=Counter)
    answered: Counter = field(default_factory=Counter)
    aborted: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)
    mistakes: dict[str, list[str]] = field(default_factory=dict)
    idle: dict[str, tuple[str, float]] = field(default_factory=dict)  # unit and figure of the idle server, by name

    def check(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except Mistake as mistake:
            self.note(mistake)

    def note(self, mistake: Mistake) -> None:
        promise, seen = mistake.args
        self.mistakes.setdefault(promise, []).append(seen)

    def sentences(self) -> list[str]:
        """One for each promise that was not kept."""
        return [
            f"not kept: {promise}: {seen[0]}" + (f" (and {len(seen) - 1} more)." if len(seen) > 1 else ".")
            for promise, seen in self.mistakes.items()
        ]

    def add_to(self, result: Result, changes: str) -> None:
        """Add the counts of each kind of request, then the idle server's figures, of a server that changes so."""
        for kind in sorted(self.sent):
            for name, counts in zip(SENT, (self.sent, self.answered, self.aborted, self.tokens), strict=True):
                unit = "tokens" if counts is self.tokens else "requests"
                result.add(name, unit, counts[kind], requests=kind, changes=changes)
        for name, (unit, figure) in self.idle.items():
            result.add(name, unit, figure, changes=changes)
