"""What the selection knows of requests that come, move and go, and what the model is told of a step's rows."""

import pytest
import torch
from vllm import SamplingParams

from vllm_yocou.rows.hand_over import RequestTable, RowSlots, StepRows


def test_the_table_follows_the_runner():
    table = RequestTable(4)
    assert not table.filled
    table.fill()
    assert table.filled
    table.add(0, SamplingParams(), 10)
    table.add(1, SamplingParams(prompt_logprobs=0), 11)
    table.add(2, SamplingParams(prompt_logprob_token_ids=[[1, 2]]), 12)
    table.add(3, None, 0)
    assert table.wants_prompt.tolist() == [False, True, True, False]
    table.swap(0, 1)
    table.move(2, 3)
    assert table.wants_prompt.tolist() == [True, False, True, True]
    assert table.prefill_length.tolist() == [11, 10, 12, 12]
    table.add(0, SamplingParams(), 5)
    assert not table.wants_prompt[0] and table.prefill_length[0] == 5


def test_a_steps_rows_go_with_its_metadata():
    """Queries of some rows over metadata of others would be answered wrongly, so that ends in a sentence."""
    slots, step = RowSlots(4), StepRows(torch.tensor([3, 7]), 1)
    metadata, other = object(), object()
    assert slots.of(metadata) is None
    slots.put(metadata, step, wanted=2)
    assert slots.of(metadata) is step and slots.wanted_of(metadata) == 2
    for ask in (slots.of, slots.wanted_of):
        with pytest.raises(RuntimeError, match="not what YOCO-U's builder made for it"):
            ask(other)
    slots.put(other, None, wanted=7)
    assert slots.of(other) is None and slots.of(metadata) is None
    # Nobody reads anything of a step without metadata, and of all rows it matters whose they are.
    assert slots.wanted_of(other) == 7 and slots.wanted_of(None) == 0
    with pytest.raises(RuntimeError, match="not what YOCO-U's builder made for it"):
        slots.wanted_of(metadata)
