"""What a served model may deviate in a type of 16 bits: 1.5 times what the reference itself does in that type."""

import copy

import torch

from harness import figures
from vllm_yocou.reference import YocoUForCausalLM

TIMES = 1.5


class HalfPrecision:
    """Compares log probabilities with the reference's in float32, whose weights are those of 16 bits."""

    def __init__(self, model: YocoUForCausalLM, dtype: torch.dtype):
        self.stored = copy.deepcopy(model).to(dtype)
        self.exact = copy.deepcopy(self.stored).float()
        self.served: list[float] = []  # differences from the exact values
        self.own: list[float] = []  # the reference's in this type, at the same places

    @torch.inference_mode()
    def compare(self, prompt: list[int], output) -> None:
        """Note the differences of all log probabilities of a vLLM RequestOutput; its tokens are taken as they are."""
        (completion,) = output.outputs
        tokens = torch.tensor([[*prompt, *completion.token_ids]])
        exact, own = (model(tokens).logits[0].float().log_softmax(-1) for model in (self.exact, self.stored))
        places = list(enumerate(completion.logprobs, len(prompt) - 1))
        places += [(i - 1, served) for i, served in enumerate(output.prompt_logprobs or []) if served is not None]
        for row, served in places:
            for token, entry in served.items():
                self.served.append(entry.logprob - exact[row, token].item())
                self.own.append((own[row, token] - exact[row, token]).item())

    def check(self) -> None:
        served, own = self.deviation(self.served), self.deviation(self.own)
        figures.note(served, len(self.served), own)
        assert own > 0
        assert served <= TIMES * own

    def deviation(self, differences: list[float]) -> float:
        """The root mean square; with experts the root median square.

        Any rounding decides some near ties between experts anew, which moves all later rows of a prompt by as much as
        another expert does: a few prompts would decide the mean.
        """
        squares = torch.tensor(differences).square()
        return (squares.median() if self.exact.config.is_moe else squares.mean()).sqrt().item()
