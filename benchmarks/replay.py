"""Replays conversations against an engine in this process, by a clock that leaves out the time when nothing runs.

Of the model only steps with prompts are computed. A step that decodes alone takes as long as `Pace` says, since it is
not what a first token waits for. Without a model every step does: vLLM's own scheduler and block pool see all requests
and all steps, nothing is computed, and every replay is the same.
"""

from benchmarks.engine import core, runner

import heapq
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from benchmarks.conversations import Conversation

ANSWER = 2  # every token of an answer that no model gave


class Clock:
    """The machine's seconds since the start, but for what `set_s` says."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self.start_s

    def set_s(self, now_s: float) -> None:
        self.start_s = time.perf_counter() - now_s


class Pace(Clock):
    """A clock that stands still between steps, each of which takes STEP_S, and TOKEN_S for each of its tokens."""

    STEP_S, TOKEN_S = 0.04, 0.001

    def __init__(self) -> None:
        self.s = 0.0

    def now_s(self) -> float:
        return self.s

    def set_s(self, now_s: float) -> None:
        self.s = now_s


@dataclass
class Answered:
    """One turn, as it was answered.

    Attributes:
        number: of the turn in its conversation.
        prompt: its tokens.
        arrived_s, first_s: when it was sent, and when its first token was there.
        cached: tokens of the prompt that were found in the prefix cache.
        globally: tokens whose global blocks were there, whether or not the window blocks were.
    """

    number: int
    prompt: int
    arrived_s: float
    first_s: float = 0.0
    cached: int = 0
    globally: int = 0


@dataclass
class Replayed:
    """Attributes:

    turns: in the order in which they were sent.
    computed: tokens of all steps.
    preemptions: requests that lost their blocks before they ended.
    """

    turns: list[Answered] = field(default_factory=list)
    computed: int = 0
    preemptions: int = 0


@dataclass
class Step:
    """Attributes:

    tokens: that are scheduled.
    has_prompts: whether any of them belongs to a prompt.
    preemptions: requests that had to make room.
    """

    tokens: int = 0
    has_prompts: bool = False
    preemptions: int = 0


@contextmanager
def steps_of(llm: LLM) -> Iterator[Step]:
    """A `Step` that is always the last one; the model is not computed in those without prompts."""
    scheduler, model_runner = core(llm).scheduler, runner(llm)
    schedule, forward, hidden_size = scheduler.schedule, model_runner.model.forward, llm.model_config.get_hidden_size()
    step = Step()

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        prompts = {request.request_id for request in scheduler.requests.values() if not request.num_output_tokens}
        output = schedule(*args, **kwargs)
        step.tokens, step.preemptions = output.total_num_scheduled_tokens, len(output.preempted_req_ids or ())
        step.has_prompts = not prompts.isdisjoint(output.num_scheduled_tokens)
        return output

    def computed(*args: Any, positions: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if step.has_prompts:
            return forward(*args, positions=positions, **kwargs)
        return torch.zeros(len(positions), hidden_size, dtype=model_runner.dtype, device=positions.device)

    with patch.object(scheduler, "schedule", scheduled), patch.object(model_runner.model, "forward", computed):
        yield step


@contextmanager
def without_model(llm: LLM) -> Iterator[None]:
    """Every step gives a token to each request whose prompt is complete, and the model runner hears of none."""
    scheduler = core(llm).scheduler

    def execute(scheduled: Any, non_block: bool = False) -> Any:
        names = list(scheduled.num_scheduled_tokens)
        requests = [scheduler.requests[name] for name in names]
        sampled = [[ANSWER] if request.num_computed_tokens >= request.num_tokens else [] for request in requests]
        done: Future = Future()
        done.set_result(ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled))
        return done

    with patch.object(core(llm).model_executor, "execute_model", execute):
        yield


@contextmanager
def pool_of(llm: LLM, blocks: int) -> Iterator[None]:
    """A pool of `blocks`, with the one that vLLM keeps empty, without a prefix: nobody can have the others."""
    manager = core(llm).scheduler.kv_cache_manager
    assert manager.reset_prefix_cache()
    withheld = manager.block_pool.get_new_blocks(manager.block_pool.num_gpu_blocks - blocks)
    yield
    manager.block_pool.free_blocks(withheld)


@contextmanager
def lookups(llm: LLM, running: dict[str, tuple[Answered, int, list[int]]]) -> Iterator[None]:
    """Note for each request, when vLLM first looks for its prefix, how much of it the global group alone has."""
    manager = core(llm).scheduler.kv_cache_manager
    coordinator, look_up = manager.coordinator, manager.get_computed_blocks

    def looked_up(request: Request) -> Any:
        answered = running[request.request_id.partition("-")[0]][0]
        if not request.num_preemptions:
            _, hits = coordinator.find_longest_cache_hit_per_group(request.block_hashes, request.num_tokens - 1)
            answered.globally = hits[coordinator.full_attention_group_id]
        return look_up(request)

    with patch.object(manager, "get_computed_blocks", looked_up):
        yield


def replay(llm: LLM, conversations: list[Conversation], clock: Clock) -> Replayed:
    """Send every turn when its user has thought, with the history as it was answered."""
    engine = llm.llm_engine
    replayed = Replayed()
    running: dict[str, tuple[Answered, int, list[int]]] = {}
    histories: list[list[int]] = [[] for _ in conversations]
    coming = [(conversation.start_s, index, 0) for index, conversation in enumerate(conversations)]
    heapq.heapify(coming)

    def send(arrived_s: float, index: int, number: int) -> None:
        turn = conversations[index].turns[number]
        prompt = histories[index] + turn.message
        answered = Answered(number, len(prompt), arrived_s)
        replayed.turns.append(answered)
        name = f"{len(replayed.turns)}"
        running[name] = answered, index, prompt
        parameters = SamplingParams(temperature=0, max_tokens=turn.answer, ignore_eos=True, detokenize=False)
        engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), parameters)

    with steps_of(llm) as step, lookups(llm, running):
        while coming or running:
            if not running:
                clock.set_s(max(coming[0][0], clock.now_s()))
            while coming and coming[0][0] <= clock.now_s():
                send(*heapq.heappop(coming))
            before_s, outputs = clock.now_s(), engine.step()
            assert step.tokens, "the pool has no room for one request alone"
            replayed.computed += step.tokens
            replayed.preemptions += step.preemptions
            if isinstance(clock, Pace) or not step.has_prompts:
                clock.set_s(before_s + Pace.STEP_S + Pace.TOKEN_S * step.tokens)
            for output in outputs:
                assert isinstance(output, RequestOutput)
                answered, index, prompt = running[output.request_id]
                if not answered.first_s:
                    answered.first_s, answered.cached = clock.now_s(), output.num_cached_tokens or 0
                if output.finished:
                    del running[output.request_id]
                    histories[index] = prompt + list(output.outputs[0].token_ids)
                    turns = conversations[index].turns
                    if answered.number + 1 < len(turns):
                        next_s = clock.now_s() + turns[answered.number].think_s
                        heapq.heappush(coming, (next_s, index, answered.number + 1))
    return replayed
