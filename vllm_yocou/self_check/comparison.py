"""Served answers next to the reference model's, and how far apart they may be.

In float32 the bound is the project's own: no log probability may differ from the reference in float32 by more than
three times the largest difference of that from float64, and no greedy token where another one is better by more than
MARGIN. In narrower dtypes float64 over the same rounded weights is the truth: the root mean square of the served
differences from it may be 1.5 times that of the reference in the same dtype. With experts it is the root median square:
any rounding decides some near ties between experts anew, which moves all later rows of a prompt, so that a few prompts
would decide the mean.
"""

import copy
from dataclasses import dataclass, field
from math import inf, isnan
from typing import Any

import torch

from vllm_yocou.reference import YocoUForCausalLM

MARGIN = 1e-3
TIMES_ROUNDING = 3.0
TIMES_RMS = 1.5


@dataclass(frozen=True)
class Answer:
    """What vLLM answered to a request.

    Attributes:
        prompt, tokens: ids of the prompt and of the greedy completion.
        logprobs: for each of `tokens`, token id -> log probability of the likeliest ones.
        prompt_logprobs: for each of `prompt` the same, None for the first; empty if nobody asked.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    prompt_logprobs: list[dict[int, float] | None] = field(default_factory=list)

    def rows(self) -> list[tuple[int, dict[int, float]]]:
        """(position of the row whose logits are meant, token id -> log probability)."""
        scored = [(position - 1, row) for position, row in enumerate(self.prompt_logprobs) if row is not None]
        return scored + list(enumerate(self.logprobs, start=len(self.prompt) - 1))


class Reference:
    """The reference model in the dtype that is served, and in float64."""

    def __init__(self, model: YocoUForCausalLM):
        self.own = model
        self.double = copy.deepcopy(model).double()
        self.dtype = model.dtype

    @torch.inference_mode()
    def log_probabilities(self, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, vocab_size) in float64, twice: in the served dtype and in float64."""
        ids = torch.tensor([token_ids], device=self.own.device)
        own = self.own(ids).logits[0].float().log_softmax(-1).double()
        return own.cpu(), self.double(ids).logits[0].log_softmax(-1).cpu()


class Comparison:
    """Of one model's answers, by the case that they belong to."""

    def __init__(self, reference: Reference):
        self.reference = reference
        self.single = reference.dtype == torch.float32
        self.served: dict[str, list[float]] = {}  # case -> served log probabilities less the expected ones
        self.own: list[float] = []  # the reference's own difference in the same places
        self.behind: dict[str, float] = {}  # case -> how much better another token than the chosen one is, at most
        self.rounding = 0.0  # the reference's own largest difference, in all places

    def add(self, case: str, answer: Answer) -> None:
        own_NV, double_NV = self.reference.log_probabilities([*answer.prompt, *answer.tokens])
        expected_NV = own_NV if self.single else double_NV
        rounding_NV = own_NV - double_NV
        self.rounding = max(self.rounding, rounding_NV.abs().max().item())
        differences = self.served.setdefault(case, [])
        for position, row in answer.rows():
            for token, logprob in row.items():
                differences.append(logprob - expected_NV[position, token].item())
                self.own.append(rounding_NV[position, token].item())
        chosen = expected_NV[len(answer.prompt) - 1 : -1]
        behind = chosen.max(-1).values - chosen[range(len(answer.tokens)), answer.tokens]
        self.behind[case] = max(self.behind.get(case, 0.0), behind.max().item())

    @property
    def bound(self) -> float:
        """Of the largest difference in float32, of the root mean square in narrower dtypes."""
        return TIMES_ROUNDING * self.rounding if self.single else TIMES_RMS * self.typical(self.own)

    def typical(self, differences: list[float]) -> float:
        """The root mean square, or the root median square with experts."""
        return median(differences) if self.reference.own.config.is_moe else rms(differences)

    @property
    def margin(self) -> float:
        """How much better than the chosen token another one may be: each of the two may err by its share.

        In narrow dtypes another expert moves both by any amount.
        """
        if self.reference.own.config.is_moe and not self.single:
            return inf
        return MARGIN if self.single else max(MARGIN, 2 * TIMES_RMS * self.rounding)

    def figures(self) -> dict[str, Any]:
        """Numbers for the report: differences in nats, and `of_bound`, 1 where the bound is reached."""
        everything = [difference for case in self.served.values() for difference in case]
        reached = largest(everything) if self.single else self.typical(everything)
        return {
            "compared": len(everything),
            "largest": largest(everything),
            "rms": rms(everything),
            "own_largest": self.rounding,
            "own_rms": rms(self.own),
            "bound": self.bound,
            "of_bound": reached / self.bound if self.bound else inf,
            "cases": {case: largest(differences) for case, differences in self.served.items()},
        }

    def wrong(self) -> list[str]:
        """What is beyond the bounds, a clause each; a difference that is not a number is beyond all of them."""
        figures, found = self.figures(), []
        if not figures["compared"]:
            return ["no log probability was compared"]
        if not figures["of_bound"] <= 1:
            # The worst case, and one with NaN is the worst.
            case = max(figures["cases"], key=lambda name: inf if isnan(of := figures["cases"][name]) else of)
            if self.single:
                found.append(
                    f"max |Δlogprob| is {figures['largest']:.1e}, in '{case}', and may be {self.bound:.1e}, "
                    f"{TIMES_ROUNDING:g} times the reference's own rounding error"
                )
            else:
                found.append(
                    f"the {'median' if self.reference.own.config.is_moe else 'RMS'} of Δlogprob is "
                    f"{figures['of_bound'] * self.bound:.1e}, its largest in '{case}', and may be {self.bound:.1e}, "
                    f"{TIMES_RMS:g} times the reference's own"
                )
        for case, behind in self.behind.items():
            if not behind <= self.margin:
                found.append(f"a greedy token in '{case}' is {behind:.1e} less likely than another one")
        return found


def largest(differences: list[float]) -> float:
    return torch.tensor(differences, dtype=torch.float64).abs().max().item() if differences else 0.0


def rms(differences: list[float]) -> float:
    return torch.tensor(differences, dtype=torch.float64).square().mean().sqrt().item() if differences else 0.0


def median(differences: list[float]) -> float:
    return torch.tensor(differences, dtype=torch.float64).abs().median().item() if differences else 0.0
