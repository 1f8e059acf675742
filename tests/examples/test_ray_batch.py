"""Replicas on a local Ray cluster: whatever dies, every row is answered once, as the reference answers it."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch
from harness.checkout import ROOT, TRAINED
from transformers import AutoTokenizer

from benchmarks.server import user_environment
from vllm_yocou.reference import YocoUForCausalLM

EXAMPLE = ROOT / "examples" / "inference" / "ray_batch.py"
ENGINE = dict(dtype="float32", kv_cache_memory_bytes=64 << 20, max_model_len=512, enforce_eager=True)
ROWS, TOKENS, BATCH = 64, 100, 4
TIMEOUT = 300


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    items = (TRAINED.parent / "evaluation" / "kjv_last_word.jsonl").read_text().splitlines()
    verses = [json.loads(item)["context"].splitlines()[-1] for item in items]
    rows = [{"id": f"row-{i}", "prompt": verse} for i, verse in enumerate(verses[:ROWS])]
    rows[ROWS // 2]["prompt"] *= 50  # longer than max_model_len
    return rows


def log(destination: Path) -> Path:
    return destination.with_suffix(".log")


def start(source: Path, destination: Path, replicas: int) -> subprocess.Popen:
    settings = ["--replicas", str(replicas), "--cpus", "0.5", "--batch", str(BATCH), "--max-tokens", str(TOKENS)]
    command = [sys.executable, str(EXAMPLE), str(TRAINED), str(source), str(destination), *settings]
    out = log(destination).open("a")
    bounded = ["timeout", "--foreground", "--signal=INT", str(TIMEOUT), *command, "--engine", json.dumps(ENGINE)]
    return subprocess.Popen(bounded, stdout=out, stderr=out, env=user_environment())


def replicas(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True) if "Replica" in child.name()]


def wait(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.args
        time.sleep(0.05)


def answers(destination: Path) -> list[dict]:
    lines = [line for part in destination.glob("*.jsonl") for line in part.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def check(rows: list[dict], answered: list[dict]) -> None:
    assert sorted(row["id"] for row in answered) == sorted(row["id"] for row in rows)
    by_id = {row["id"]: row for row in answered}
    for row in rows:
        assert by_id[row["id"]]["prompt"] == row["prompt"]
    refused = [row for row in answered if row.get("completion") is None]
    assert [row["id"] for row in refused] == [f"row-{ROWS // 2}"] and "512" in refused[0]["error"]
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    reference = YocoUForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()
    for row in rows[::13]:
        prompt = torch.tensor([tokenizer.encode(row["prompt"])])
        settings = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        expected = reference.generate(prompt, **settings)[0, prompt.shape[1] :]
        assert by_id[row["id"]]["completion"] == tokenizer.decode(expected, skip_special_tokens=True)


def written(rows: list[dict], folder: Path) -> tuple[Path, Path]:
    """Input and output of a run."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source, folder / "answers"


def test_every_row_is_answered_once(starts_vllm, rows, tmp_path):
    """By one replica, with the row that is too long among them."""
    some = rows[ROWS // 2 - 7 : ROWS // 2 + 7]
    source, destination = written(some, tmp_path)
    assert start(source, destination, replicas=1).wait(TIMEOUT) == 0, log(destination).read_text()
    check(some, answers(destination))


def test_no_row_is_lost_or_doubled(starts_vllm, both_cores, nightly, rows, tmp_path):
    """A replica is killed and replaced, the whole run is interrupted, then it goes on."""
    source, destination = written(rows, tmp_path)
    process = start(source, destination, replicas=2)
    wait(process, lambda: list(destination.glob("*")))
    victim, _ = replicas(process)
    dying = [victim, *victim.children(recursive=True)]
    victim.kill()
    wait(process, lambda: not any(dead.is_running() for dead in dying))
    wait(process, lambda: len(replicas(process)) == 2)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    done = answers(destination)
    assert 0 < len(done) < ROWS
    process = start(source, destination, replicas=2)
    assert process.wait(TIMEOUT) == 0, log(destination).read_text()
    assert f"{len(done)} of {ROWS} rows are in" in log(destination).read_text()
    check(rows, answers(destination))


@pytest.fixture(scope="module")
def ray_batch(starts_vllm, nightly):
    specification = importlib.util.spec_from_file_location("ray_batch", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.ray.init(num_cpus=2, log_to_driver=False)
    yield module
    module.ray.shutdown()


def refusal(capsys, function, *arguments) -> str:
    with pytest.raises(SystemExit) as exit:
        function(*arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    return line


@pytest.mark.parametrize(
    "lines, complaint",
    [
        (['{"id": 1, "text": "a"}'], "they need id, and prompt or messages"),
        (['{"id": 1, "prompt": "a"}', '{"id": 1, "prompt": "b"}'], "2 rows and 1 ids"),
        (['{"id": 1, "prompt": "a", "error": ""}'], "have error, which answers are written to"),
        (['{"id": 1, "prompt": '], "cannot be read"),
        ([], "they need id, and prompt or messages"),
        (None, "must be a file of JSON lines or Parquet"),
    ],
    ids=["columns", "ids", "taken", "cut-short", "empty", "absent"],
)
def test_input_that_cannot_be_answered_once_is_refused(ray_batch, lines, complaint, tmp_path, capsys):
    source = tmp_path / "rows.jsonl"
    if lines is not None:
        source.write_text("\n".join(lines))
    assert complaint in refusal(capsys, ray_batch.read, source)


def test_text_that_looks_like_a_date_is_text(ray_batch, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "2024-01-01", "prompt": "2024-01-02"}')
    rows, _ = ray_batch.read(tmp_path / "rows.jsonl")
    assert rows.take_all() == [{"id": "2024-01-01", "prompt": "2024-01-02"}]
    ray_batch.write(pa.Table.from_pylist(rows.take_all()), tmp_path / "part.jsonl")
    assert ray_batch.finished(tmp_path, "part.jsonl") == {"2024-01-01"}


def test_what_would_wait_for_ever_is_refused(ray_batch, capsys):
    for needs, complaint in (
        ({"CPU": 1.0}, "leave none of the cluster's 2 CPUs to read"),
        ({"CPU": 3.0}, "room for 0 replicas of 3 CPUs, not for 2"),
        ({"CPU": 0.0, "GPU": 1.0}, "room for 0 replicas of 1 GPUs, not for 2"),
    ):
        assert complaint in refusal(capsys, ray_batch.check_resources, 2, needs)
    ray_batch.check_resources(2, {"CPU": 0.5, "GPU": 0.0})


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_both_formats(ray_batch, kind, tmp_path):
    """What is written is known to be finished, whole files alone."""
    assert ray_batch.finished(tmp_path, kind) == set()
    for number in range(2):
        part = pa.Table.from_pylist([{"id": 2 * number + i, "prompt": "a"} for i in range(2)])
        ray_batch.write(part, tmp_path / f"part-{number}{kind}")
    (tmp_path / f".part-2{kind}.unfinished").write_text("half")
    assert ray_batch.finished(tmp_path, kind) == {0, 1, 2, 3}
    rows, found = ray_batch.read(tmp_path)
    assert found == kind and sorted(rows.unique("id")) == [0, 1, 2, 3]
