"""What a served model may differ from the reference: the project's bound of exactness in float32.

No greedy token may differ where the reference's best two logits are more than MARGIN apart, and no log probability by
more than three times the reference's own difference between float32 and float64.
"""

import copy

import torch

from harness import figures
from vllm_yocou.reference import YocoUForCausalLM

MARGIN = 1e-3


class Oracle:
    def __init__(self, model: YocoUForCausalLM):
        self.single = model
        self.double = copy.deepcopy(model).double()
        self.rounding = 0.0  # largest float32-float64 difference seen
        self.difference = 0.0  # largest served-reference difference seen
        self.compared = 0

    @torch.inference_mode()
    def log_probabilities(self, token_ids: list[int]) -> torch.Tensor:
        """(N, vocab_size) of the float32 reference; notes its own rounding on the way."""
        tokens = torch.tensor([token_ids])
        single = self.single(tokens).logits[0].log_softmax(-1)
        double = self.double(tokens).logits[0].log_softmax(-1)
        self.rounding = max(self.rounding, (single - double).abs().max().item())
        return single

    def compare(self, prompt: list[int], output, completion=None, greedy: bool = True) -> None:
        """Note the differences of one completion of a vLLM RequestOutput, by default its first; check greedy tokens."""
        completion = completion or output.outputs[0]
        expected = self.log_probabilities([*prompt, *completion.token_ids])
        for step, (token, served) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
            row = expected[len(prompt) - 1 + step]
            best, second = row.topk(2).values
            assert not greedy or token == row.argmax() or best - second <= MARGIN, (
                f"token {step} of a {len(prompt)}-token prompt"
            )
            self._note(served, row)
        for position, served in enumerate(output.prompt_logprobs or []):
            if served is not None:
                self._note(served, expected[position - 1])

    def _note(self, served: dict, row: torch.Tensor) -> None:
        for token, entry in served.items():
            self.difference = max(self.difference, abs(entry.logprob - row[token].item()))
            self.compared += 1

    def check(self) -> None:
        """That what was compared is within the bound; what it was is printed at the end of the run."""
        figures.note(self.difference, self.compared, self.rounding)
        assert self.compared > 0
        assert self.difference <= 3 * self.rounding


def agrees(model: YocoUForCausalLM, prompts: list[list[int]], outputs: list, **compare) -> Oracle:
    """Hold the first completion of each of `outputs` to the bound; `compare` goes to Oracle.compare."""
    oracle = Oracle(model)
    for prompt, output in zip(prompts, outputs, strict=True):
        oracle.compare(prompt, output, **compare)
    oracle.check()
    return oracle


def check(model: YocoUForCausalLM, requests: list[dict], outputs: list) -> None:
    """Hold every completion of `outputs` to the bound; `requests` are those of engine_process.run."""
    oracle = Oracle(model)
    for request, output in zip(requests, outputs, strict=True):
        wanted = "prompt_logprobs" in request.get("sampling", {})
        assert (output.prompt_logprobs is not None) == wanted
        for completion in output.outputs:
            greedy = "temperature" not in request.get("sampling", {})
            oracle.compare(request["prompt"], output, completion, greedy)
    oracle.check()
