"""Ranks that hold different experts: of one engine, and of two that exchange the rows of every step."""

import pytest
from harness import tiny
from harness.oracle import check

CHUNK = 37
LONG, SHORT = 150, 5  # the first takes five chunks


def saved(folder, **overrides):
    model = tiny.model(tiny.moe_config(**overrides))
    model.save_pretrained(folder)
    return model


def request(length: int, tokens: int, **sampling) -> dict:
    return {"prompt": tiny.prompt(length), "sampling": {"max_tokens": tokens, **sampling}}


def rows(batch) -> tuple[int, int]:
    """Rows in the cross-decoder, and rows that skipped it."""
    return batch.metrics["yocou_cross_decoder_rows"], batch.metrics["yocou_skipped_rows"]


def calls(batch) -> tuple[int, int]:
    """Of the cross-decoder, and rows in them."""
    return batch.metrics["cross_decoder_calls"], batch.metrics["cross_decoder_called_rows"]


@pytest.mark.parametrize("engine_process", ["two-ranks"], indirect=True)
def test_two_engines_share_experts_and_both_skip(engine_process, tmp_path):
    model = saved(tmp_path, shared_expert_gate=True)
    beside = [request(LONG, 2)], [request(SHORT, 12)]  # one in prefill beside one in decode, which ends last
    idle = [request(LONG + 1, 2)], []
    every_row = [request(LONG + 2, 2)], [request(SHORT + 1, 3, prompt_logprobs=1)]
    batches = beside, idle, every_row
    ranks = engine_process.run_ranks(
        tmp_path, [list(of_rank) for of_rank in zip(*batches)], enable_expert_parallel=True
    )
    for own, found in zip(zip(*batches), ranks, strict=True):
        for requests, batch in zip(own, found, strict=True):
            if requests:
                check(model, requests, batch.outputs)
    assert [[rows(batch) for batch in found] for found in ranks] == [
        [(2, LONG - 1), (2, LONG), (2, LONG + 1)],
        [(12, SHORT - 1), (0, 0), (SHORT + 3, 0)],
    ]
    # Both ranks call the cross-decoder in the same steps, and in no step in which nobody has a row for it: each of the
    # 12 tokens of the first batch, the 2 of the second, and of the third the first three chunks and the 2 tokens. A
    # rank without a row, idle or in the midst of a prompt, brings one that nobody reads.
    assert [[calls(batch) for batch in found] for found in ranks] == [
        [(12, 12), (2, 2), (5, 5)],
        [(12, 12), (2, 2), (5, SHORT + 1 + 4)],
    ]
