"""What a user can type: figures, or one line and exit code 2."""

import json

import pytest
import tiny

from vllm_yocou import command_line
from vllm_yocou.kv_bytes import KVBytes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.config().save_pretrained(folder)
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "incomplete").mkdir()
    (folder / "incomplete" / "config.json").write_text('{"model_type": "yoco_u", "hidden_size": -1}')
    return folder


def run(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["vllm-yocou", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        command_line.main()
    printed = capsys.readouterr()
    return exit.value.code or 0, printed.out, printed.err


def test_kv(checkpoint, capsys, monkeypatch):
    options = ("--context", "1k", "--concurrency", 3, "--tp", 2, "--kv-cache-dtype", "fp8", "--budget", "1m")
    code, printed, _ = run(capsys, monkeypatch, "kv", checkpoint, *options, "--json")
    rows = json.loads(printed)["rows"]
    cost = KVBytes.yoco_u(tiny.config(), 1, ranks=2)
    assert code == 0 and [row["architecture"] for row in rows] == [
        "YOCO-U, T = 3",
        "YOCO, T = 1",
        "Transformer, 4 layers",
    ]
    assert rows[0]["request_bytes"] == rows[0]["global_bytes"] + rows[0]["window_bytes"] == cost.of_request(1024)
    assert rows[0]["all_bytes"] == 3 * cost.of_request(1024)
    assert rows[0]["tokens_in_budget"] == cost.tokens_in(2**20 // 3)

    code, printed, _ = run(capsys, monkeypatch, "kv", checkpoint / "config.json", *options)
    assert code == 0 and f"{cost.of_request(1024) / 2**20:,.1f} MiB" in printed


def test_info(checkpoint, capsys, monkeypatch):
    code, printed, _ = run(capsys, monkeypatch, "info", checkpoint, "--json")
    facts = json.loads(printed)
    assert code == 0 and (facts["iterations"], facts["sliding_window"]) == (3, 16)
    assert facts["parameters"] > facts["active_parameters"] > 0 and facts["flops_a_token_at_4096"] > 0
    code, printed, _ = run(capsys, monkeypatch, "info", checkpoint)
    assert code == 0 and f"{facts['parameters']:,}" in printed


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["kv", "{}/broken"], "not a valid JSON file"),
        (["kv", "{}/other"], "is of model_type 'llama': give a checkpoint of 'yoco_u'"),
        (["kv", "{}/incomplete"], "config key 'vocab_size' is missing"),
        (["info", "{}/absent"], "absent"),
        (["kv", "{}", "--context", "many"], "'many' is not a positive whole number"),
        (["kv", "{}", "--context", "0"], "'0' is not a positive whole number"),
        (["kv", "{}", "--tp", "3"], "2 KV heads can be neither split over nor replicated on 3 ranks"),
        (["kv", "{}", "--tp", "0"], "Invalid value for '--tp'"),
        (["kv", "{}", "--kv-cache-dtype", "int3"], "'int3' is not one of"),
        (["kv"], "Missing argument"),
        (["kv", "{}", "--nonsense"], "No such option"),
        (["nonsense"], "No such command"),
    ],
)
def test_errors_are_one_line(arguments, complaint, checkpoint, capsys, monkeypatch):
    arguments = [argument.format(checkpoint) for argument in arguments]
    code, printed, error = run(capsys, monkeypatch, *arguments)
    assert code == 2 and printed == "" and len(error.splitlines()) == 1
    assert error.startswith("vllm-yocou: ") and complaint in error
