"""KV connectors beside row skipping: each cache is waited for, written and saved once a step, and no answer changes.

The connector is that of harness/kv_connector.py, which ends the engine over a hook too many or too few and hands out
NaN for what was not waited for. A store outlives its engine, within the process of a runner.
"""

from math import ceil
from types import SimpleNamespace

import pytest
import torch
from harness import tiny
from harness.engine_process import GREEDY
from harness.kv_connector import MemoryConnector, Page, Step, WrongHook, store, transfer
from harness.oracle import check
from harness.runners import Batch, EngineProcess
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from vllm_yocou.config import YocoUConfig

WAIT, SAVE = "wait_for_layer_load", "save_kv_layer"
CHUNK, WINDOW_PAGE = 37, 32
SHORT, LONG = [tiny.prompt(length) for length in (1, 9, CHUNK, 100, 150)], tiny.prompt(250)
UNSEEN = tiny.prompt(60, seed=5)
SCORED = {"prompt_logprobs": 1}


def requests(prompts: list[list[int]], **sampling) -> list[dict]:
    return [{"prompt": prompt, "sampling": {"max_tokens": 5} | sampling} for prompt in prompts]


FIRST = requests([*SHORT, LONG])
BATCHES = {
    "first": FIRST,
    "again": requests([*SHORT, LONG]),
    "scored": requests([SHORT[3], UNSEEN], **SCORED),
    "longer": requests([prompt + UNSEEN for prompt in (*SHORT[1:], LONG)]),
    # Eight requests that grow until the pool cannot hold their second global blocks.
    "preempted": [
        {"prompt": tiny.prompt(length, length), "sampling": {"max_tokens": 200 - length}}
        for length in range(160, 200, 5)
    ],
    # In the middle of their prompts, in decode, and before they were ever scheduled.
    "aborted": [
        *({"prompt": tiny.prompt(200, seed)} | {"aborted_after": steps} for seed, steps in ((1, 1), (2, 2), (3, 7))),
        *requests([tiny.prompt(200, seed=4)]),
    ],
    "after the aborted": requests([tiny.prompt(200, seed) for seed in (1, 2, 3, 4)]),
}


def step_of_two_layers(step: Step, hooks: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """What the engine's memory of layers "0" and "1" is after a step that calls `hooks`; "1" is loaded from ones."""
    spec = SimpleNamespace(block_size=4, sliding_window=None)
    groups = [SimpleNamespace(layer_names=["0", "1"], kv_cache_spec=spec)]
    settings = transfer("of two layers")
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(**settings))
    connector = MemoryConnector(config, KVConnectorRole.WORKER, SimpleNamespace(kv_cache_groups=groups))
    connector.store.failures = 0
    memory = {name: torch.zeros(3, 1, 4, 2) for name in ("0", "1")}
    connector.register_kv_caches(memory)
    connector.bind_connector_metadata(step)
    connector.start_load_kv(None)
    for hook, layer in hooks:
        getattr(connector, hook)(*(layer, memory[layer], None) if hook == SAVE else (layer,))
    connector.wait_for_save()
    return memory


ALL_HOOKS = [(WAIT, "0"), (SAVE, "0"), (WAIT, "1"), (SAVE, "1")]


@pytest.mark.parametrize(
    "computes, hooks, reason",
    [
        (True, [*ALL_HOOKS[:2], *ALL_HOOKS], "0 is waited for twice"),
        (True, [*ALL_HOOKS, (SAVE, "1")], "1 is saved twice"),
        (True, [(SAVE, "0"), (WAIT, "0")], "or before it is waited for"),
        (True, ALL_HOOKS[:3], r"\['1'\] are not saved"),
        (True, ALL_HOOKS[2:], r"\['0'\] are not waited for"),
        (False, ALL_HOOKS, "in a step without a forward pass"),
    ],
)
def test_the_connector_ends_an_engine_that_calls_wrong_hooks(computes, hooks, reason):
    step_of_two_layers(Step(computes), ALL_HOOKS if computes else [])
    with pytest.raises(WrongHook, match=reason):
        step_of_two_layers(Step(computes), hooks)


def test_the_connector_hands_out_nothing_before_it_is_waited_for():
    page = Page("request", (1, 2), "1", block=2, key=("1", (1, 2), 0))
    store("of two layers").pages = {page.key: torch.ones(1, 4, 2)}
    memory = step_of_two_layers(Step(True, loads=[page]), ALL_HOOKS)
    assert (memory["1"][2] == 1).all() and not memory["1"][:2].any() and not memory["0"].any()
    memory = step_of_two_layers(Step(False, loads=[page]), [])
    assert memory["1"][2].isnan().all()
    lost = Page("request", (1, 2), "0", block=2, key=("0", (1, 2), 0))
    store("of two layers").pages[lost.key] = torch.full((1, 4, 2), float("nan"))
    with pytest.raises(WrongHook, match="never loaded"):
        step_of_two_layers(Step(True, loads=[lost], saves=[Page("other", (3,), "0", 2, ("0", (3,), 0))]), ALL_HOOKS)


class Sizes:
    """Bytes of a tiny model's pages, from its config: float32, blocks of 32 tokens, all windows in one group."""

    def __init__(self, cfg: YocoUConfig):
        self.window, self.windows = cfg.sliding_window, cfg.num_iterations * cfg.num_self_decoder_layers
        token = 2 * 4 * cfg.num_key_value_heads * cfg.head_dim
        self.window_page = self.windows * WINDOW_PAGE * token
        self.global_page = self.window_page
        self.global_tokens = self.global_page // (2 * 4 * cfg.cross_num_key_value_heads * cfg.cross_head_dim)

    def of(self, tokens: int, first: int = 0, window: int | None = None) -> int:
        """From the token `first` to the end of so many: their global pages, and those of the last tokens' windows."""
        last = max(first, tokens - (window or self.window), 0)
        windows = ceil(tokens / WINDOW_PAGE) - last // WINDOW_PAGE
        pages = ceil(tokens / self.global_tokens) - first // self.global_tokens
        return windows * self.window_page + pages * self.global_page


def rows(request: dict, cached: int) -> tuple[int, int]:
    """Rows through the self-decoder and the cross-decoder that one request must cost."""
    sampling = GREEDY | request.get("sampling", {})
    prompt, generated = len(request["prompt"]) - cached, sampling["max_tokens"] - 1
    return prompt + generated, (prompt if "prompt_logprobs" in sampling else 1) + generated


class Ran:
    """An engine with a connector, and what it did with BATCHES."""

    def __init__(self, process: EngineProcess, name: str, folder, iterations: int, **settings):
        self.model = tiny.model(tiny.config(num_iterations=iterations, qk_norm="all", cross_decoder_rope=True))
        self.model.save_pretrained(folder)
        self.sizes = Sizes(self.model.config)
        # Eight requests hold a global block each and two for their windows, but not two and two.
        memory = 28 * self.sizes.global_page
        ran = process.run(
            folder,
            list(BATCHES.values()),
            kv_transfer_config=transfer(name),
            kv_cache_memory_bytes=memory,
            **settings,
        )
        self.batches = dict(zip(BATCHES, ran, strict=True))

    def checked(self, name: str) -> Batch:
        answered = [request for request in BATCHES[name] if "aborted_after" not in request]
        check(self.model, answered, self.batches[name].outputs)
        return self.batches[name]


ENGINES = {
    "v1": dict(iterations=3),
    "v1-T1": dict(iterations=1),
    "v2": dict(iterations=3),
    "v2-T1": dict(iterations=1),
    "v1-graphs": dict(iterations=3, compilation_config={"mode": 3}),
}
IN_EVERY_RUN = ("v1", "v2")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[] if name in IN_EVERY_RUN else pytest.mark.slow) for name in ENGINES],
)
def ran(request, engine_processes, tmp_path_factory):
    process = engine_processes.of(request.param.removesuffix("-T1"))
    return Ran(process, request.param, tmp_path_factory.mktemp("checkpoint"), **ENGINES[request.param])


def check_rows(batch: Batch, asked: list[dict]) -> None:
    counted = [rows(one, output.num_cached_tokens) for one, output in zip(asked, batch.outputs, strict=True)]
    self_rows, cross_rows = (sum(counts) for counts in zip(*counted, strict=True))
    assert batch.metrics["yocou_self_decoder_rows"] == self_rows
    assert batch.metrics["yocou_cross_decoder_rows"] == cross_rows


def test_chunks_without_rows_are_saved(ran):
    """Each prompt's global pages, and of its windows the pages of the last W tokens."""
    batch = ran.checked("first")
    check_rows(batch, FIRST)
    assert batch.metrics["yocou_skipped_rows"] == sum(len(one["prompt"]) - 1 for one in FIRST)
    assert batch.metrics["saved_bytes"] == sum(ran.sizes.of(len(one["prompt"])) for one in FIRST)
    assert batch.metrics["loads"] == batch.metrics["loaded_bytes"] == 0


def test_a_prompt_is_loaded(ran):
    """What this engine still has of the long one, it does not load."""
    batch = ran.checked("again")
    check_rows(batch, BATCHES["again"])
    assert [output.num_cached_tokens for output in batch.outputs] == [len(one["prompt"]) - 1 for one in FIRST]
    lengths, block = [len(one["prompt"]) - 1 for one in FIRST[1:]], ran.sizes.global_tokens
    assert lengths[-1] > block and batch.metrics["loads"] == len(lengths)
    loaded = [ran.sizes.of(length, length // block * block, ran.sizes.window - 1) for length in lengths]
    assert batch.metrics["loaded_bytes"] == sum(loaded)
    assert batch.metrics["saved_bytes"] == 0


def test_prompt_log_probabilities_load_nothing(ran):
    batch = ran.checked("scored")
    check_rows(batch, BATCHES["scored"])
    assert batch.metrics["loads"] == 0


def test_a_prompt_goes_on_from_where_another_ended(ran):
    batch = ran.checked("longer")
    check_rows(batch, BATCHES["longer"])
    assert [output.num_cached_tokens for output in batch.outputs] == [len(prompt) for prompt in (*SHORT[1:], LONG)]
    assert batch.metrics["yocou_skipped_rows"] == len(batch.outputs) * (len(UNSEEN) - 1)


def test_preempted_requests_load_their_prompts_again(ran):
    batch = ran.checked("preempted")
    assert batch.metrics["num_preemptions"] > 0 and batch.metrics["yocou_skipped_rows"] > 0
    assert batch.metrics["loads"] > 0


def test_aborted_requests_leave_nothing_half_saved(ran):
    assert len(ran.checked("aborted").outputs) == 1
    batch = ran.checked("after the aborted")
    assert batch.metrics["loads"] > 0


def started(engine_process: EngineProcess, folder, **overrides):
    """A tiny model in `folder`, and what runs batches of requests on it in an engine with a connector of its own."""
    model = tiny.model(tiny.config(**overrides))
    model.save_pretrained(folder)

    def run(batches: list[list[dict]], settings: dict, **transfers) -> list[Batch]:
        transfers = {"name": str(folder)} | transfers
        return engine_process.run(folder, batches, kv_transfer_config=transfer(**transfers), **settings)

    return model, run


BOTH_RUNNERS = pytest.mark.parametrize(
    "engine_process", ["v1", pytest.param("v2", marks=pytest.mark.slow)], indirect=True
)


@BOTH_RUNNERS
def test_loads_between_steps_that_fail_half_way(engine_process, tmp_path):
    """Two requests whose loads fail are computed; one is aborted while it loads."""
    model, run = started(engine_process, tmp_path)
    aborted = {"prompt": SHORT[4], "aborted_after": 1}
    _, again, last = run([FIRST, FIRST, [aborted, *FIRST]], {}, asynchronous=True, failures=2)
    check(model, FIRST, again.outputs)
    assert (again.metrics["loads"], again.metrics["failed_loads"]) == (len(FIRST) - 1, 2)
    cached = [0, 0, 0, *(len(one["prompt"]) - 1 for one in FIRST[3:])]
    assert again.metrics["yocou_self_decoder_rows"] == sum(rows(*each)[0] for each in zip(FIRST, cached, strict=True))
    check(model, FIRST, last.outputs)
    assert last.metrics["loads"] == len(FIRST) and last.metrics["failed_loads"] == 0


@BOTH_RUNNERS
def test_a_request_whose_load_fails_can_end(engine_process, tmp_path):
    model, run = started(engine_process, tmp_path)
    _, batch = run([FIRST, FIRST], {}, asynchronous=True, failures=1, policy="fail")
    failed = [i for i, output in enumerate(batch.outputs) if output.outputs[0].finish_reason == "error"]
    assert failed == [1]
    others = [(one, output) for i, (one, output) in enumerate(zip(FIRST, batch.outputs, strict=True)) if i != 1]
    check(model, *map(list, zip(*others, strict=True)))


@pytest.mark.parametrize("engine_process, failures", [("v1", 2), ("v2", 0)], indirect=["engine_process"])
def test_without_the_hybrid_manager(engine_process, failures, nightly, tmp_path):
    """One group, in which vLLM knows blocks: a load that fails in the step that needs it is computed from there on.

    vLLM's V2 runner does not go back to there.
    """
    model, run = started(engine_process, tmp_path)
    _, batch = run([FIRST, FIRST], dict(disable_hybrid_kv_cache_manager=True), failures=failures)
    check(model, FIRST, batch.outputs)
    assert (batch.metrics["loads"], batch.metrics["failed_loads"]) == (len(FIRST) - 1, failures)


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
@BOTH_RUNNERS
def test_a_producer_and_a_consumer_answer_as_one_engine(engine_process, asynchronous, tmp_path):
    """The producer computes prompts, the consumer their last tokens and all that follow."""
    model, run = started(engine_process, tmp_path, qk_norm="all", cross_decoder_rope=True)
    sizes, lengths = Sizes(model.config), [len(one["prompt"]) for one in FIRST]
    prompts = requests([*SHORT, LONG], max_tokens=1, logprobs=None)
    (produced,) = run([prompts], {}, role="kv_producer")
    assert produced.metrics["saved_bytes"] == sum(map(sizes.of, lengths))
    assert produced.metrics["yocou_cross_decoder_rows"] == 0
    (consumed,) = run([FIRST], {}, role="kv_consumer", asynchronous=asynchronous)
    check(model, FIRST, consumed.outputs)
    assert consumed.metrics["saved_bytes"] == 0
    assert consumed.metrics["loaded_bytes"] == sum(sizes.of(n - 1, 0, sizes.window - 1) for n in lengths)
    assert consumed.metrics["yocou_skipped_rows"] == 0
    assert consumed.metrics["yocou_self_decoder_rows"] == sum(rows(one, len(one["prompt"]) - 1)[0] for one in FIRST)
