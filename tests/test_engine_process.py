"""One process serves engine after engine; an engine that fails to start is an answer and not the end of the process."""

import pytest
from harness import tiny
from harness.runners import EngineProcess, JobFailed

REQUESTS = [{"prompt": tiny.prompt(length), "sampling": {"max_tokens": 2}} for length in (5, 40)]


def test_a_failed_start_and_what_comes_after_it(engine_process, tmp_path):
    tiny.model(tiny.config()).save_pretrained(tmp_path)
    before = engine_process.process.pid
    (batch,) = engine_process.run(tmp_path, [REQUESTS])
    with pytest.raises(JobFailed, match="max_model_len"):
        engine_process.run(tmp_path, [REQUESTS], max_model_len=-5)
    first, second = engine_process.run(tmp_path, [REQUESTS, REQUESTS[:1]])
    assert engine_process.process.pid == before
    # Of this engine's batches alone, whatever engines the process has had.
    assert batch.metrics["yocou_self_decoder_rows"] == first.metrics["yocou_self_decoder_rows"] == 5 + 40 + 2
    assert second.metrics["yocou_self_decoder_rows"] == 5 + 1
    assert [output.outputs[0].token_ids for output in batch.outputs + batch.outputs[:1]] == [
        output.outputs[0].token_ids for output in first.outputs + second.outputs
    ]


def test_a_process_that_died_says_so(tmp_path):
    process = EngineProcess("v1", tmp_path / "log")
    process.process.kill()
    with pytest.raises(JobFailed, match="the process ended with -9"):
        process.run(tmp_path, [REQUESTS])
    assert not process.alive
    process.end()
