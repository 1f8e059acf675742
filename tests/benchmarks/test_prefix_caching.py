"""Prefix caching as it is measured: what a replay counts, and the rule by which a default would change."""

from unittest.mock import patch

import pytest
from harness import tiny
from harness.engines import kv_cache_config, model_runner

from benchmarks.conversations import Conversation, Trace, Turn
from benchmarks.results import Result
from benchmarks.tables import prefix_caching as table


def measured(p95: float = 0.8, around: float = 5.5, groups: int = 3) -> Result:
    """With 256, the 57M shape's window: the time to first token of one turn in ten, and a step of 101 ms."""
    result = Result("prefix_caching", "", dict(windows={table.TIMED: 256, table.PAPER: 512}))
    for limit, first_s, outside in ((512, 1.0, 5.0), (256, p95, around)):
        for shape in (table.TIMED, table.PAPER):
            result.add("KV groups", "groups", groups if limit == 256 else 3, shape=shape, limit=limit)
        of = dict(shape=table.TIMED, limit=limit)
        result.add("time to first token", "s", [0.5] * 9 + [first_s] * 11, **of)
        result.add("decode step", "ms", [100.0, 100.0, 400.0], **of)
        result.add("outside the model", "ms", [outside, outside, 90.0], **of)
    return result


def holds(result: Result) -> dict[str, bool]:
    return {name: table.verdict(result, rule)[0] for name, rule in table.rules(result).items()}


def test_a_default_changes_where_all_three_hold():
    everywhere, by_window = "256 tokens", table.WINDOW
    assert holds(measured()) == {everywhere: True, by_window: True}
    assert holds(measured(p95=0.91)) == holds(measured(around=6.0)) == {everywhere: False, by_window: False}
    assert holds(measured(p95=0.9, around=5.99)) == {everywhere: True, by_window: True}
    # The window of the paper's shape leaves its groups alone.
    assert holds(measured(groups=4)) == {everywhere: False, by_window: True}


def test_the_figures_that_decide_are_said():
    said = table.verdict(measured(groups=5), table.rules(measured())["256 tokens"])[1]
    assert said == "p95 -20%, step +0.5%, paper's shape 5 groups"


# Two window groups and a global one, whose blocks have 96 tokens.
OPTIONS = {"yocou": {"max_global_block": 100}}


@pytest.fixture(scope="module")
def llm(module_engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model(tiny.config(num_iterations=3)).save_pretrained(folder)
    return module_engine(folder, additional_config=OPTIONS, max_num_batched_tokens=101, async_scheduling=False)


def test_a_replay_counts_what_is_computed_again(llm):
    """By hand, and with the model as without it.

    The second turn finds windows where the first prompt ends, at 288 tokens, and global blocks of the 389 tokens that
    were computed, so of 384. The last turn finds both at 384. The other conversation shares a system prompt of 100
    tokens, and finds no windows there.
    """
    from benchmarks.replay import Clock, Pace, pool_of, replay, without_model

    assert sorted(group.kv_cache_spec.block_size for group in kv_cache_config(llm).kv_cache_groups) == [32, 32, 96]
    prompt = tiny.prompt(300)
    turns = [Turn(prompt, 90, 1.0), Turn(tiny.prompt(30, seed=1), 4, 1.0), Turn(tiny.prompt(10, seed=2), 4, 1.0)]
    conversations = [Conversation(0, turns), Conversation(50, [Turn(prompt[:100] + tiny.prompt(50, seed=3), 4, 1.0)])]
    blocks = kv_cache_config(llm).num_blocks
    with pool_of(llm, blocks), without_model(llm):
        counted = [replay(llm, conversations, Pace())]
    with pool_of(llm, blocks), without_model(llm):
        counted.append(replay(llm, conversations, Pace()))
    assert counted[0] == counted[1]
    model = model_runner(llm).model
    with pool_of(llm, blocks), patch.object(model, "forward", wraps=model.forward) as forward:
        counted.append(replay(llm, conversations, Clock()))
    assert forward.call_count == 3 + 2 + 1 + 2  # chunks of the prompts, by 101 tokens
    for replayed in counted:
        assert [turn.prompt for turn in replayed.turns] == [300, 420, 434, 150]
        assert [turn.cached for turn in replayed.turns] == [0, 288, 384, 0]
        assert [turn.globally for turn in replayed.turns] == [0, 384, 384, 96]
        again = replayed.computed - Trace(system=100).needed(conversations)
        assert again == (389 - 288) + (423 - 384) + 100
    # Three chunks, each of which takes 40 ms by the clock, and its tokens 1 ms each.
    first = counted[0].turns[0]
    assert first.first_s - first.arrived_s == pytest.approx(3 * 0.04 + 0.3)


def test_a_small_pool_loses_windows_first(llm):
    """Another conversation takes the blocks: the turn after it finds global blocks, and no windows to go on from."""
    from benchmarks.replay import Pace, pool_of, replay, without_model

    conversations = [
        Conversation(0, [Turn(tiny.prompt(300), 2, 100.0), Turn(tiny.prompt(10, seed=1), 2, 1.0)]),
        Conversation(50, [Turn(tiny.prompt(800, seed=2), 2, 1.0)]),
    ]
    found = []
    for blocks in (kv_cache_config(llm).num_blocks, 22):
        with pool_of(llm, blocks), without_model(llm):
            found.append([(turn.cached, turn.globally) for turn in replay(llm, conversations, Pace()).turns])
    assert found == [[(0, 0), (0, 0), (288, 288)], [(0, 0), (0, 0), (0, 288)]]


def test_the_table_on_a_tiny_shape(starts_vllm, nightly, monkeypatch):
    from benchmarks import prefix_caching as measuring

    few = dict(conversations=2, turns=(2, 2))
    small = dict(TRACES={"chats": Trace(turns=(2, 2)), "documents": Trace(turns=(2, 2))}, SPOKEN=Trace(**few), ROUNDS=1)
    small |= dict(LIMITS=(512, 64), BATCH=2, CONTEXT=40, STEPS=1, STEP_ROUNDS=2, AMPLE_BYTES=256 << 20)
    small |= dict(DTYPES={table.TIMED: "float32"}, TIMED_BYTES=64 << 20)
    for name, value in small.items():
        monkeypatch.setattr(measuring, name, value)
    monkeypatch.setitem(measuring.SHAPES, table.TIMED, measuring.SHAPES["yoco-u-kjv"])
    result = measuring.measure()
    header, rows = table.rows(result)
    assert [row[:4] for row in rows] == [[table.TIMED, 512, "2", "288"], [table.TIMED, 64, "6", "64"]]
    assert len(result.runs("time to first token", limit=64)) == 4 and len(result.runs("decode step", limit=64)) == 2
    assert len(header) == len(rows[0]) and all(cell != "" for row in rows for cell in row)
