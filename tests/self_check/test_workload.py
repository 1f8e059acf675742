"""The requests provoke what their cases are named for."""

import pytest
from harness import tiny
from harness.checkout import TRAINED

from vllm_yocou.config import YocoUConfig
from vllm_yocou.self_check import workload
from vllm_yocou.serving.packing import Packing

# The trained model's blocks are longer, and fewer of its requests run together.
CONFIGS = tiny.CONFIGS | {"trained": YocoUConfig.from_pretrained(TRAINED)}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("block", [16, 32])
def test_the_pool_holds_what_must_run_and_not_all_that_grow(cfg, block):
    context = 1024
    packing = Packing.expected(cfg, 4, 1, block)
    blocks = workload.pool_blocks(packing, cfg, context) - 1
    cases, left_out = workload.cases(cfg, context, packing.global_block, packing.groups, blocks)
    by_name = {case.name: case for case in cases}
    assert left_out == {} and set(by_name) == {workload.BESIDE, workload.CHUNKED, workload.HIT, workload.PREEMPTED}

    def held(request: workload.Request, in_flight: int = 1) -> int:
        return packing.blocks(len(request.prompt) + request.tokens, cfg.sliding_window, in_flight)

    beside = by_name[workload.BESIDE].batches[0]
    assert sum(held(request, workload.CHUNK) for request in beside) <= blocks
    assert {request.scored for request in beside} == {True, False}
    assert packing.blocks(context, cfg.sliding_window, workload.IN_FLIGHT) <= blocks
    growing = by_name[workload.PREEMPTED].batches[0]
    # As many as have come when the first one ends: of each step's tokens, the others' decodes leave the rest.
    steps_each = len(growing[0].prompt) / (workload.CHUNK - workload.SEQUENCES)
    together = growing[: 1 + int(growing[0].tokens / steps_each)]
    assert sum(map(held, together)) > blocks
    for request in growing:
        assert len(request.prompt) < packing.global_block < len(request.prompt) + request.tokens
    (first,), (again, scored) = by_name[workload.HIT].batches
    assert first.prompt == again.prompt == scored.prompt and len(first.prompt) > packing.global_block
    assert len(by_name[workload.CHUNKED].batches[0][0].prompt) > workload.CHUNK


def test_a_short_context_leaves_out_what_needs_a_second_block():
    cases, left_out = workload.cases(tiny.config(), 200, 192, 1, 26)
    assert {case.name for case in cases} == {workload.BESIDE, workload.CHUNKED}
    assert set(left_out) == {workload.HIT, workload.PREEMPTED}
    for case in cases:
        for request in case.batches[0]:
            assert len(request.prompt) + request.tokens <= 200


REQUEST = workload.Request(list(range(100)))
SCORED = workload.Request(list(range(100)), scored=True)


@pytest.mark.parametrize(
    "name, requests, changed, complaint",
    [
        (workload.BESIDE, [REQUEST, SCORED], {"skipped": 98}, "98 rows skipped"),
        (workload.BESIDE, [REQUEST, SCORED], {"skipped": 198}, "instead of 99"),
        (workload.CHUNKED, [REQUEST], {"step": 100}, "no prompt was chunked"),
        (workload.HIT, [REQUEST], {"hit": 0}, "no prefix hit happened"),
        (workload.PREEMPTED, [REQUEST], {"preempted": 0}, "no preemption happened"),
    ],
)
def test_what_does_not_happen_is_named(name, requests, changed, complaint):
    case = workload.Case(name, [requests])
    happened = dict(step=64, hit=64, preempted=1, skipped=99)
    assert list(case.missed(workload.Happened(**happened), may_skip=True)) == []
    (named,) = case.missed(workload.Happened(**happened | changed), may_skip=True)
    assert complaint in named


def test_rows_that_skip_where_none_may_are_named():
    case = workload.Case(workload.BESIDE, [[REQUEST]])
    assert list(case.missed(workload.Happened(64, 0, 0, 0), may_skip=False)) == []
    assert list(case.missed(workload.Happened(64, 0, 0, 99), may_skip=False))
