"""Ranks that share experts know of each other's rows wherever one of them leaves rows out, and of nothing elsewhere."""

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.v1.worker.dp_utils import skip_dp_coordination

from vllm_yocou.rows import ranks
from vllm_yocou.rows.ranks import Ranks


class OneSum:
    """The group of some ranks in this process: whoever waits first finds what all have said by then."""

    def __init__(self):
        self.said: list[torch.Tensor] = []

    def all_reduce(self, tensor, group, async_op):
        assert group == "on the host" and async_op
        self.said.append(tensor)
        return SimpleNamespace(wait=self.wait)

    def wait(self):
        total = sum(self.said)
        while self.said:
            self.said.pop().copy_(total)


@pytest.fixture
def step(monkeypatch):
    """Of two ranks: what each is told, from (wanted, skips) of each, in a step of this mode of CUDA graphs."""
    group = OneSum()
    monkeypatch.setattr(ranks.distributed, "all_reduce", group.all_reduce)
    monkeypatch.setattr(ranks, "get_dp_group", lambda: SimpleNamespace(cpu_group="on the host"))

    def told(*said, mode=CUDAGraphMode.NONE):
        both = [Ranks(SimpleNamespace(data_parallel_rank=rank, data_parallel_size=2)) for rank in (0, 1)]
        with override_forward_context(SimpleNamespace(cudagraph_runtime_mode=mode)):
            agreements = [one.agree(*own) for one, own in zip(both, said, strict=True)]
        return [agreement and agreement.shares() for agreement in agreements]

    return told


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE])
@pytest.mark.parametrize(
    "said, rows",
    [
        ([(1, True), (4, False)], [1, 4]),
        ([(0, True), (4, False)], [0, 4]),
        ([(0, True), (0, False)], [0, 0]),
        ([(3, False), (0, False)], None),
        ([(0, False), (0, False)], None),
    ],
)
def test_both_are_told_the_same(said, rows, mode, step):
    for shares in step(*said, mode=mode):
        assert (shares and shares.rows_P.tolist()) == rows
        assert shares is None or shares.nobody_calls == (not any(rows))


def test_nothing_is_asked_where_all_know(step):
    """Full graphs hold decodes alone and have no place for a sum; vLLM may let ranks run on their own."""
    assert step((0, True), (1, False), mode=CUDAGraphMode.FULL) == [None, None]
    with skip_dp_coordination():
        assert step((0, True), (1, False)) == [None, None]


def test_what_the_layers_see_of_the_ranks(step):
    before = SimpleNamespace(dp_metadata="of all rows", attn_metadata="of the step")
    for shares, attention in zip(step((0, True), (4, False)), (None, "of the step"), strict=True):
        with override_forward_context(before):
            with shares.in_force():
                seen = get_forward_context()
                # A rank without rows has one in the call, over which nothing is attended to.
                assert seen.dp_metadata.num_tokens_across_dp_cpu.tolist() == [1, 4]
                assert seen.attn_metadata is attention
            assert vars(before) == dict(dp_metadata="of all rows", attn_metadata="of the step")


@pytest.mark.parametrize(
    "is_moe, engines, skip", [(True, 2, True), (False, 2, True), (True, 1, True), (True, 2, False)]
)
def test_only_ranks_whose_rows_may_skip_and_that_share_experts_ask(is_moe, engines, skip):
    vllm_config = SimpleNamespace(
        additional_config={"yocou": {"skip_rows": skip}},
        model_config=SimpleNamespace(runner_type="generate", is_moe=is_moe),
        parallel_config=SimpleNamespace(use_ubatching=False, data_parallel_size=engines),
        kv_transfer_config=None,
        lora_config=None,
        speculative_config=None,
    )
    assert (Ranks.of(vllm_config) is not None) == (is_moe and engines == 2 and skip)
