"""One prompt, sent to an engine of this process in different company; how far what it is told moves."""

import math
import random
from collections.abc import Iterator
from itertools import takewhile
from typing import Any
from unittest.mock import patch

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

ANSWER = 16  # tokens
ALONE = "alone, once more"
HIT, PREEMPTED = "after a prefix hit", "after a preemption"

# Tokens with their log probabilities.
Told = list[tuple[int, float]]


def prompt(length: int, vocabulary: int, seed: int) -> TokensPrompt:
    numbers = random.Random(seed)
    return TokensPrompt(prompt_token_ids=[numbers.randrange(3, vocabulary) for _ in range(length)])


class Prober:
    """Sends one prompt to an engine in different company.

    Args:
        tokens: of the prompt.
        others: requests beside it, of at most `longest` tokens each.
        chunks: tokens of a step in other runs.
    """

    def __init__(
        self,
        llm: LLM,
        tokens: int,
        others: int,
        longest: int,
        chunks: tuple[int, ...],
    ):
        self.llm, self.chunks = llm, chunks
        vocabulary = llm.model_config.get_vocab_size()
        self.answer = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, logprobs=0, detokenize=False)
        self.prompts = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        self.probe = prompt(tokens, vocabulary, 0)
        lengths = [random.Random(n).randrange(20, longest) for n in range(others)]
        self.others = [prompt(length, vocabulary, n + 1) for n, length in enumerate(lengths)]

    def run(self, params: SamplingParams, others: bool = False, chunk: int = 0, preempt_after: int = 0) -> Told:
        """Tokens and log probabilities of the probe's prompt, or of its answer.

        Args:
            chunk: tokens of a step; 0 for what the engine takes.
            preempt_after: steps after which every request is preempted; 0 for none.
        """
        engine: Any = self.llm.llm_engine
        scheduler = engine.engine_core.engine_core.scheduler  # an engine of this process
        # vLLM's own limit, `long_prefill_token_threshold`, does not hold for a request that is alone.
        with patch.object(scheduler, "max_num_scheduled_tokens", chunk or scheduler.max_num_scheduled_tokens):
            # The probe stands in the middle, in whatever order the batch has.
            before, after = (self.others[::2], self.others[1::2]) if others else ([], [])
            for number, one in enumerate(before):
                engine.add_request(f"before-{number}", one, self.answer)
            engine.add_request("probe", self.probe, params)
            for number, one in enumerate(after):
                engine.add_request(f"after-{number}", one, self.answer)
            found: Any = None
            steps, first = 0, 0  # the step of the first token
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.request_id == "probe":
                        first = first or steps + 1
                        found = output if output.finished else found
                steps += 1
                if steps == preempt_after:
                    engine.reset_prefix_cache(reset_running_requests=True)
        assert not chunk or first * chunk >= len(self.probe["prompt_token_ids"]), "the prompt was not cut"
        if params.prompt_logprobs is not None:
            tokens, entries = found.prompt_token_ids[1:], found.prompt_logprobs[1:]
        else:
            tokens, entries = found.outputs[0].token_ids, found.outputs[0].logprobs
        self.hit = found.num_cached_tokens
        return [(token, entry[token].logprob) for token, entry in zip(tokens, entries, strict=True)]

    def afresh(self, *args: Any, **kwargs: Any) -> Told:
        assert self.llm.reset_prefix_cache()
        return self.run(*args, **kwargs)

    def differences(self) -> Iterator[tuple[str, str, float]]:
        """(what of the probe, in which company, largest difference from the probe alone).

        Of answers, up to a token that another one takes the place of: what follows is another text.
        """
        for what, params in (("prompt", self.prompts), ("answer", self.answer)):
            alone = self.afresh(params)

            def largest(other: Told, alone: Told = alone) -> float:
                same = takewhile(lambda pair: pair[0][0] == pair[1][0], zip(alone, other, strict=True))
                return max((abs(a - b) for (_, a), (_, b) in same), default=math.inf)

            yield what, ALONE, largest(self.afresh(params))
            yield what, f"among {len(self.others)} others", largest(self.afresh(params, others=True))
            for chunk in self.chunks:
                yield what, f"in chunks of {chunk}", largest(self.afresh(params, chunk=chunk))
            if what == "answer":
                hit = self.run(params)
                assert self.hit
                yield what, HIT, largest(hit)
                yield what, PREEMPTED, largest(self.afresh(params, others=True, preempt_after=ANSWER // 2))
