"""Requests and a pool of KV blocks so small that chunks, prefix hits and preemptions must happen."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from vllm_yocou.config import YocoUConfig
from vllm_yocou.serving.packing import Packing

CHUNK = 64  # tokens of a step
SEQUENCES = 16  # at a time
COMPLETION = 8
IN_FLIGHT = 2 * CHUNK  # vLLM may schedule a step while another one is computed
BEFORE_A_BLOCK = 8  # tokens that it still has to decode until its global block is full

BESIDE = "prompt logprobs beside skipping requests"
CHUNKED = "a chunked prompt"
HIT = "a prefix hit"
PREEMPTED = "a preemption"


@dataclass(frozen=True)
class Request:
    """A prompt, how many tokens to decode greedily, and whether the prompt's log probabilities are wanted."""

    prompt: list[int]
    tokens: int = COMPLETION
    scored: bool = False


@dataclass(frozen=True)
class Happened:
    """What the engine's counters say of a case: tokens that a step takes, the longest prefix hit, how often, rows."""

    step: int
    hit: int
    preempted: int
    skipped: int


@dataclass(frozen=True)
class Case:
    """Batches of requests, one after the other."""

    name: str
    batches: list[list[Request]]

    @property
    def rows_to_skip(self) -> int:
        """Prompt rows whose logits nobody reads; nothing is cached before the case."""
        requests = [request for batch in self.batches for request in batch]
        return sum(len(request.prompt) - 1 for request in requests if not request.scored)

    def missed(self, happened: Happened, may_skip: bool) -> Iterator[str]:
        """What the case is there for and did not happen, a clause each."""
        if self.name == CHUNKED and len(self.batches[0][0].prompt) <= happened.step:
            yield f"no prompt was chunked, a step takes {happened.step} tokens"
        if self.name == HIT and not happened.hit:
            yield "no prefix hit happened"
        if self.name == PREEMPTED and not happened.preempted:
            yield "no preemption happened"
        to_skip = self.rows_to_skip if may_skip else 0
        # Hits and preemptions change how many rows there are.
        if self.name in (BESIDE, CHUNKED) and happened.skipped != to_skip:
            yield f"{happened.skipped} rows skipped the cross-decoder in '{self.name}' instead of {to_skip}"


def pool_blocks(packing: Packing, config: YocoUConfig, context: int) -> int:
    """A block that vLLM keeps empty, and what the longest request, four of the preempted or all of BESIDE may take."""
    window = config.sliding_window
    four = 4 * packing.blocks(packing.global_block, window, CHUNK)
    beside = sum(packing.blocks(length + COMPLETION, window, CHUNK) for length in lengths_beside(window))
    return 1 + max(packing.blocks(context, window, IN_FLIGHT), four, beside)


def lengths_beside(window: int) -> list[int]:
    """Prompt lengths of BESIDE: the shortest, and those around a window and a step."""
    window = min(window, 2 * CHUNK)
    return [1, 2, window, window + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]


def growth(global_block: int, groups: int, blocks: int) -> int:
    """Tokens that each request of a preemption decodes.

    The first one must still grow when enough others have come to fill the pool: each holds at least two global blocks
    and one of every window group then, and decodes leave CHUNK - SEQUENCES tokens of a step to prompts.
    """
    others = min(SEQUENCES, ceil(blocks / (2 + groups)) + 1)
    return BEFORE_A_BLOCK + ceil(others * global_block / (CHUNK - SEQUENCES))


def cases(
    config: YocoUConfig, context: int, global_block: int, groups: int, blocks: int
) -> tuple[list[Case], dict[str, str]]:
    """What is asked of a model, and which cases its `context` is too short for: name -> reason.

    Args:
        global_block, groups, blocks: of the running engine, tokens of a global block, window groups and the pool.
    """
    draw = random.Random(0)
    longest = context - COMPLETION

    def prompt(length: int) -> list[int]:
        return [draw.randrange(config.vocab_size) for _ in range(max(1, min(length, longest)))]

    lengths = enumerate(lengths_beside(config.sliding_window))
    made = [
        Case(BESIDE, [[Request(prompt(length), scored=number % 3 == 1) for number, length in lengths]]),
        Case(CHUNKED, [[Request(prompt(3 * CHUNK + 5))]]),
    ]
    grown = growth(global_block, groups, blocks)
    if global_block + COMPLETION + grown > context:
        reason = f"a context of {context} tokens is too short for a second global block of {global_block}"
        return made, {HIT: reason, PREEMPTED: reason}
    shared = Request(prompt(global_block + 9))
    made.append(Case(HIT, [[shared], [shared, Request(shared.prompt, scored=True)]]))
    almost = global_block - BEFORE_A_BLOCK
    growing = [Request(prompt(almost - number % 4), grown) for number in range(SEQUENCES)]
    return [*made, Case(PREEMPTED, [growing])], {}
