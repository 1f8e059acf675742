"""Rows skip where breakable CUDA graphs are replayed: the cross-decoder runs between two of them, on a step's rows."""

import pytest
from harness import tiny
from harness.oracle import Oracle


@pytest.mark.parametrize("engine_process", ["v1-breakable"], indirect=True)
@pytest.mark.parametrize(
    "skip_rows",
    [pytest.param(True, marks=pytest.mark.runner("v1-breakable")), pytest.param(False, marks=pytest.mark.slow)],
)
def test_what_graphs_replay_takes_the_rows_of_its_step(skip_rows, engine_process, tmp_path):
    model = tiny.model(tiny.config(num_iterations=2, qk_norm="all"))
    model.save_pretrained(tmp_path)
    requests = [{"prompt": tiny.prompt(length)} for length in (1, 5, 16, 17, 50, 133)]
    all_rows = [request | {"sampling": {"prompt_logprobs": 1}} for request in requests]
    settings = {"additional_config": {"yocou": {"skip_rows": skip_rows}}}
    batches = engine_process.run(tmp_path, [requests, all_rows], **settings)
    oracle = Oracle(model)
    for batch in batches:
        for request, output in zip(requests, batch.outputs, strict=True):
            oracle.compare(request["prompt"], output)
        assert batch.metrics["graph_replays"] > batch.metrics["graph_captures"] == 0
    oracle.check()
    assert (batches[0].metrics["yocou_skipped_rows"] > 0) == skip_rows
    called = batches[0].metrics["cross_decoder_called_rows"]
    assert (called == batches[0].metrics["yocou_cross_decoder_rows"]) == skip_rows
