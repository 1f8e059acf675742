"""Ranks that hold different experts: of one engine, and of two that exchange the rows of every step."""

import pytest
from harness import tiny
from harness.checkout import needs_compiler
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


def two_engines(process, model, folder, **settings) -> list[list]:
    """The batches of two ranks that share experts, whose tokens are the reference's and whose rows are counted."""
    beside = [request(LONG, 2)], [request(SHORT, 12)]  # one in prefill beside one in decode, which ends last
    idle = [request(LONG + 1, 2)], []
    every_row = [request(LONG + 2, 2)], [request(SHORT + 1, 3, prompt_logprobs=1)]
    of_ranks = [list(batches) for batches in zip(beside, idle, every_row, strict=True)]
    ranks = process.run_ranks(folder, of_ranks, **settings)
    for asked, found in zip(of_ranks, ranks, strict=True):
        for requests, batch in zip(asked, found, strict=True):
            if requests:
                check(model, requests, batch.outputs)
    assert [[rows(batch) for batch in found] for found in ranks] == [
        [(2, LONG - 1), (2, LONG), (2, LONG + 1)],
        [(12, SHORT - 1), (0, 0), (SHORT + 3, 0)],
    ]
    return ranks


EXPERT_PARALLEL = dict(enable_expert_parallel=True)


@pytest.mark.parametrize(
    "engine_process, overrides, settings",
    [
        pytest.param("two-ranks", dict(shared_expert_gate=True), EXPERT_PARALLEL, id="own-experts"),
        pytest.param("two-ranks", {}, {}, marks=pytest.mark.slow, id="parts-of-experts"),
        pytest.param(
            "two-ranks",
            tiny.CLAMP | tiny.LATENT | dict(moe_latent_norm=True, shared_expert_intermediate_size=None),
            EXPERT_PARALLEL,
            marks=pytest.mark.slow,
            id="clamped-latent",
        ),
        pytest.param(
            "two-ranks",
            {},
            EXPERT_PARALLEL | dict(compilation_config={"mode": 3}),
            marks=[pytest.mark.slow, needs_compiler],
            id="compiled",
        ),
        pytest.param("v2", {}, EXPERT_PARALLEL, marks=pytest.mark.slow, id="v2"),
    ],
    indirect=["engine_process"],
)
def test_two_engines_share_experts_and_both_skip(engine_process, overrides, settings, tmp_path):
    ranks = two_engines(engine_process, saved(tmp_path, **overrides), tmp_path, **settings)
    # Both ranks call the cross-decoder in the same steps, and in no step in which nobody has a row for it: each of the
    # 12 tokens of the first batch, the 2 of the second, and of the third the first three chunks and the 2 tokens. A
    # rank without a row, idle or in the midst of a prompt, brings one that nobody reads.
    assert [[calls(batch) for batch in found] for found in ranks] == [
        [(12, 12), (2, 2), (5, 5)],
        [(12, 12), (2, 2), (5, SHORT + 1 + 4)],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("engine_process", ["v1-graphs"], indirect=True)
def test_two_engines_pad_to_each_other_and_replay(engine_process, tmp_path, both_cores):
    """Where vLLM pads ranks to one number of rows, for its graphs, those that skip or decode beside them do not."""
    model = saved(tmp_path)
    compilation = dict(mode=3, cudagraph_mode="FULL_AND_PIECEWISE", cudagraph_capture_sizes=[1, 2, 4, 8, CHUNK])
    ranks = two_engines(engine_process, model, tmp_path, compilation_config=compilation, **EXPERT_PARALLEL)
    assert all(batch.metrics["graph_replays"] for found in ranks for batch in found)
    # The rank in decode, which vLLM pads to the chunk of the one in prefill, calls with its own row alone.
    assert ranks[1][0].metrics["cross_decoder_called_rows"] < CHUNK


@pytest.mark.parametrize("engine_process", ["two-ranks"], indirect=True)
def test_one_engine_splits_experts(engine_process, tmp_path):
    model = saved(tmp_path)
    requests = [request(length, 12) for length in (1, 50, LONG)]
    (batch,) = engine_process.run(tmp_path, [requests], **EXPERT_PARALLEL)
    check(model, requests, batch.outputs)
    assert rows(batch) == (3 * 12, 49 + LONG - 1)
