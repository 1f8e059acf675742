"""Which rows run, against a loop that says it in words."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_yocou.rows.hand_over import RequestTable
from vllm_yocou.rows.selection import RowSelector, select_rows, why_all_rows


def in_words(requests: list[dict]) -> tuple[list[int], list[int]]:
    """(rows, rows of each request): a row runs if a token is sampled after it or its log probabilities are wanted."""
    rows, counts, start = [], [], 0
    for request in requests:
        before = request["context"] - request["rows"]
        own = [
            start + i
            for i in range(request["rows"])
            # The token at position p decides what is sampled at p + 1, which the prefill may already contain.
            if request["wants"] or not request["prefilling"] or before + i + 1 >= request["prompt"]
        ]
        start += request["rows"]
        rows += own
        counts.append(len(own))
    return rows, counts


def draw_request(draw: random.Random) -> dict:
    rows, before = draw.choice([0, 1, 1, 2, 5, 37]), draw.choice([0, 3, 40])
    context, prompt = before + rows, draw.choice([0, before, before + rows, before + rows + 1, before + 100])
    return dict(rows=rows, context=context, prompt=prompt, prefilling=draw.random() < 0.6, wants=draw.random() < 0.3)


def test_against_words():
    draw = random.Random(0)
    for _ in range(500):
        requests = [draw_request(draw) for _ in range(draw.randint(1, 9))]
        columns = {key: np.array([request[key] for request in requests]) for key in requests[0]}
        selected = select_rows(
            np.concatenate([[0], np.cumsum(columns["rows"])]).astype(np.int32),
            columns["context"],
            columns["prefilling"],
            columns["wants"],
            columns["prompt"],
        )
        rows, counts = in_words(requests)
        assert selected.rows_M.tolist() == rows and selected.rows_M.dtype == np.int64
        assert np.diff(selected.query_start_loc).tolist() == counts and selected.query_start_loc.dtype == np.int32


def settings(**changed) -> SimpleNamespace:
    """The part of a VllmConfig that decides."""
    parts = dict(
        additional_config={},
        model_config=SimpleNamespace(runner_type="generate", is_moe=False),
        lora_config=None,
        parallel_config=SimpleNamespace(use_ubatching=False, data_parallel_size=2),
        speculative_config=None,
        use_v2_model_runner=False,
    )
    return SimpleNamespace(**parts | changed)


MIXTURE = SimpleNamespace(runner_type="generate", is_moe=True)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({}, None),
        (dict(additional_config={"yocou": {"skip_rows": False}}), "skip_rows is off"),
        (dict(model_config=SimpleNamespace(runner_type="pooling")), "pooling"),
        (dict(lora_config=object()), None),
        (dict(model_config=MIXTURE), None),
        (dict(model_config=MIXTURE, lora_config=object()), "adapters of ranks that share"),
        (dict(parallel_config=SimpleNamespace(use_ubatching=True)), "micro-batches"),
        (dict(speculative_config=object()), "V1 runner does not say"),
        (dict(speculative_config=object(), use_v2_model_runner=True), None),
    ],
)
def test_what_runs_all_rows(changed, reason):
    found = why_all_rows(settings(**changed))
    assert (found is None) if reason is None else (reason in found)


@pytest.mark.parametrize("warms_up, begins", [([False, False], True), ([True, False], False), ([True, True], False)])
@pytest.mark.parametrize("req_idx", [None, np.array([0, 1])])
def test_a_prompt_of_somebodys_begins_a_request(warms_up, begins, req_idx):
    """The first of two requests is in prefill; a third is padding."""
    requests = RequestTable(4)
    for index, made_up in enumerate(warms_up):
        requests.add(index, None, 5, made_up)
    selector = RowSelector(settings(), requests)
    batch = SimpleNamespace(is_prefilling=torch.tensor([True, False]), req_idx=req_idx)
    assert selector.begins_a_request(batch) == begins
    batch.is_prefilling[0] = False
    assert not selector.begins_a_request(batch)
    batch.is_prefilling = None  # what vLLM builds to capture or to warm up may not say
    assert not selector.begins_a_request(batch)


def test_a_batch_that_vllm_made_up_has_no_context():
    """As vLLM's V2 runner gives an idle rank's; a real request either begins or has tokens before its rows."""

    def made_up(contexts: list[int], prefilling: list[bool] | None) -> bool:
        batch = SimpleNamespace(
            query_start_loc_cpu=torch.tensor([0, 1, 3]),
            seq_lens_cpu_upper_bound=torch.tensor([*contexts, 9]),  # the last is padding
            is_prefilling=prefilling and torch.tensor([*prefilling, False]),
        )
        return RowSelector.is_made_up(batch)

    assert made_up([1, 2], [False, False]) and not made_up([1, 2], None)
    assert not made_up([2, 2], [False, False]) and not made_up([1, 2], [True, False])
