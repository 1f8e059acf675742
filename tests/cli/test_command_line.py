"""What a user can type: figures, or one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import foreign_sources as sources
from harness import tiny
from harness.checkout import TRAINED
from harness.conversions import save_changed_state
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_yocou import __version__
from vllm_yocou.checkpoints import example
from vllm_yocou.checkpoints.sources import names
from vllm_yocou.cli import command_line, environment
from vllm_yocou.cli.sizing import KVBytes


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
    (folder / "list").mkdir()
    (folder / "list" / "config.json").write_text("[]")
    (folder / "cut-short").mkdir()
    sources.save_yoco2024(folder / "cut-short", {}, {})
    (folder / "cut-short" / "params.json").write_text('{"dim": ')
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

    # By hand, on CUDA with 8192 tokens a step and two steps in flight: six window caches of 64 bytes a token share
    # blocks of 16 tokens, or 96 of the global cache. Of 170 blocks one stays empty, 64 + 11 go to a prefill, 2 + 11 to
    # each request in decode. Of plain YOCO's 512, with 32 tokens of the global cache, 64 + 32 and 2 + 32. A block of
    # the Transformer has 16 tokens of four layers.
    together = [1 + (169 - 75) // 13, 1 + (511 - 96) // 34, 255 // 64]
    assert [row["together_in_budget"] for row in rows] == together
    assert [row["guaranteed_in_budget"] for row in rows] == [169 // 75, 511 // 96, 255 // 64]

    code, printed, _ = run(capsys, monkeypatch, "kv", checkpoint / "config.json", *options)
    assert code == 0 and f"{cost.of_request(1024) / 2**20:,.1f} MiB" in printed
    assert "In 1 MiB on cuda, 8,192 tokens a step" in printed
    assert all(f" {count} " in printed for count in together)


def test_a_budget_in_the_unit_that_reads_best(checkpoint, capsys, monkeypatch):
    for budget, shown in {
        "24m": "24 MiB",
        "1536m": "1.5 GiB",
        "40g": "40 GiB",
        "5000g": "4.883 TiB",
        "9": "9 bytes",
    }.items():
        options = ("--budget", budget, "--device", "cpu")
        assert f"In {shown} on cpu, 1,024 tokens a step" in run(capsys, monkeypatch, "kv", checkpoint, *options)[1]


def test_a_mixtures_config_alone(tmp_path, capsys, monkeypatch):
    """A gate that is left to the weights is named and not counted, wherever those are: nothing is downloaded."""
    printed = {}
    for gate in (None, False, True):
        tiny.moe_config(shared_expert_gate=gate).save_pretrained(tmp_path)
        for command in ("kv", "info"):
            code, out, error = run(capsys, monkeypatch, command, tmp_path / "config.json", "--json")
            assert (code, error) == (0, "")
        printed[gate] = json.loads(out)
    assert printed[None].pop("shared_expert_gate") == "left to the weights, and not counted"
    assert printed[False].pop("shared_expert_gate") is None
    assert printed[None] == printed[False]
    layers, width = tiny.config().num_hidden_layers, tiny.config().hidden_size
    assert printed[True]["parameters"] == printed[False]["parameters"] + layers * width


def test_info(checkpoint, capsys, monkeypatch):
    code, printed, _ = run(capsys, monkeypatch, "info", checkpoint, "--json")
    facts = json.loads(printed)
    assert code == 0 and (facts["iterations"], facts["sliding_window"]) == (3, 16)
    assert facts["parameters"] > facts["active_parameters"] > 0 and facts["flops_a_token_at_4096"] > 0
    code, printed, _ = run(capsys, monkeypatch, "info", checkpoint)
    assert code == 0 and f"{facts['parameters']:,}" in printed


def test_info_says_which_switches_are_on(tmp_path, capsys, monkeypatch):
    config = tiny.moe_config(
        differential_attention="v3",
        qk_norm="all",
        qk_clip_limit=3.0,
        swiglu_limit=10.0,
        moe_latent_size=40,
        moe_latent_norm=True,
        first_k_dense_replace=1,
        router_in_fp32=True,
        residual_in_fp32=True,
        logit_scale=0.5,
        shared_expert_gate=True,
    )
    config.save_pretrained(tmp_path)
    code, printed, _ = run(capsys, monkeypatch, "info", tmp_path / "config.json", "--json")
    facts = json.loads(printed)
    assert code == 0 and facts["self_decoder_heads"] == "8 query, 2 KV of 32"
    assert facts["differential_attention"].startswith("v3") and facts["gates_of_heads"] is None
    assert facts["queries_and_keys"] == "clipped to 3 in both decoders"
    assert (facts["swiglu_limit"], facts["experts_read"]) == ("10", "40 numbers, normed")
    assert (facts["dense_layers"], facts["router"], facts["residual"]) == ("the first 1", "float32", "float32")
    assert facts["active_parameters_in_all_iterations"] > facts["active_parameters"]
    code, printed, _ = run(capsys, monkeypatch, "info", tmp_path / "config.json")
    assert "clipped to 3 in both decoders" in printed and "gates of heads" not in printed


def test_info_without_a_model_describes_the_machine(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "hunter2")
    code, printed, _ = run(capsys, monkeypatch, "info", "--json")
    assert (code, json.loads(printed)) == (0, environment.describe())
    code, table, _ = run(capsys, monkeypatch, "info")
    assert code == 0
    assert __version__ in table
    assert "VLLM_API_KEY" in table
    assert "hunter2" not in printed + table


# What takes seconds to import.
HEAVY = {"torch", "vllm", "transformers", "safetensors"}
LOADED = """
import sys
from vllm_yocou.cli.command_line import main
try:
    main()
except SystemExit as end:
    print(end.code, *sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["convert", "--help"],
        ["example", "--help"],
        ["check", "--help"],
        ["kv", TRAINED],
        ["info", TRAINED],
        ["info"],
    ],
)
def test_what_needs_no_torch_imports_none(arguments):
    ended = subprocess.run([sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=True)
    code, *loaded = ended.stderr.split()
    assert code in ("0", "None")
    assert ended.stdout.strip()
    assert not HEAVY & {module.partition(".")[0] for module in loaded}
    assert "vllm_yocou.cli.sizing" in loaded


def test_help_names_every_source(capsys, monkeypatch):
    for command in ("convert", "upcycle"):
        code, printed, _ = run(capsys, monkeypatch, command, "--help")
        words = " ".join(printed.replace("│", " ").split())
        assert code == 0
        assert f"Folder of {names(command)}." in words


def test_the_installed_command():
    command = Path(sys.executable).parent / "vllm-yocou"
    printed = subprocess.run([command, "info", TRAINED, "--json"], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed)["self_decoder_layers"] == 3


def test_convert(tmp_path, capsys, monkeypatch):
    source, destination = tmp_path / "source", tmp_path / "converted"
    source.mkdir()
    sources.save_yoco2024(source, sources.YOCO2024, sources.yoco2024_weights(sources.YOCO2024))
    code, printed, _ = run(capsys, monkeypatch, "convert", source, destination, "--dry-run")
    assert code == 0 and not destination.exists()
    assert "cross_decoder.k_proj.weight -> model.global_kv.k_proj.weight [16, 48] float32" in printed.splitlines()
    code, printed, progress = run(capsys, monkeypatch, "convert", source, destination, "--dtype", "bfloat16")
    assert code == 0 and "ready for vllm serve" in printed and "KiB" in progress
    code, printed, _ = run(capsys, monkeypatch, "info", destination, "--json")
    assert code == 0 and json.loads(printed)["iterations"] == 1
    code, _, error = run(capsys, monkeypatch, "convert", source, destination)
    assert code == 2 and "already exists" in error and len(error.splitlines()) == 1


def test_convert_says_what_the_source_leaves_open_and_what_is_left_out(tmp_path, capsys, monkeypatch):
    save_changed_state(tmp_path, keys=dict(rope_theta=None), tensors={"mtp_norm.weight": torch.ones(2)})
    code, printed, notes = run(capsys, monkeypatch, "convert", tmp_path, tmp_path / "converted", "--dry-run")
    assert code == 0 and "mtp_norm.weight -> left out: predicts further tokens in training" in printed.splitlines()
    assert notes == "note: the source does not give 'rope_theta': 10000.0 is used, as in the authors' code.\n"
    code, printed, notes = run(capsys, monkeypatch, "convert", tmp_path, tmp_path / "converted")
    assert code == 0 and "left out: mtp_norm.weight (predicts further tokens in training)" in printed.splitlines()
    assert "note: the source does not give 'rope_theta'" in notes


def test_upcycle(tmp_path, capsys, monkeypatch):
    source, destination = tmp_path / "llama", tmp_path / "made"
    sizes = dict(vocab_size=31, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=4)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(source)
    capsys.readouterr()
    asked = ("--iterations", 2, "--window", 8, "--self-from", "0,2", "--cross-from", "2-3", "--no-cross-rope")
    code, printed, _ = run(capsys, monkeypatch, "upcycle", source, destination, *asked, "--dry-run")
    assert code == 0 and not destination.exists()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    assert cells == [
        ["self layer 0", "layer 0", "layer 0"],
        ["self layer 1", "layer 2", "layer 2"],
        ["global K and V", "layer 2", ""],
        ["cross layer 0", "layer 2", "layer 2"],
        ["cross layer 1", "layer 2", "layer 3"],
    ]
    code, printed, progress = run(capsys, monkeypatch, "upcycle", source, destination, *asked)
    assert code == 0 and "global K and V" in printed and "examples/training/distill.py" in printed and "KiB" in progress
    code, printed, _ = run(capsys, monkeypatch, "info", destination, "--json")
    assert (json.loads(printed)["iterations"], json.loads(printed)["sliding_window"]) == (2, 8)
    code, _, error = run(capsys, monkeypatch, "upcycle", source, destination, *asked)
    assert code == 2 and "already exists" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("trained", [True, False])
def test_example(trained, tmp_path, capsys, monkeypatch):
    if not trained:
        monkeypatch.setattr(example, "TRAINED", tmp_path / "nowhere")
    folder = tmp_path / "a model"
    code, printed, _ = run(capsys, monkeypatch, "example", folder)
    copy = "a copy of the trained model examples/yoco-u-kjv"
    nonsense = "a random model, which only shows that serving works and answers nonsense"
    assert code == 0
    serving = f"vllm serve '{folder}' (on a CPU add --dtype float32 --kv-cache-memory-bytes 256M)"
    assert printed == f"{folder}: {copy if trained else nonsense}; serve it with: {serving}\n"
    code, printed, _ = run(capsys, monkeypatch, "info", folder, "--json")
    assert code == 0 and json.loads(printed)["iterations"] == 3
    code, printed, error = run(capsys, monkeypatch, "example", folder)
    assert (code, printed, error) == (2, "", f"vllm-yocou: {folder} already exists: give a new folder.\n")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["kv", "{}/broken"], "config.json is not JSON"),
        (["kv", "{}/other"], "is of model_type 'llama': give a checkpoint of 'yoco_u'"),
        (["kv", "{}/incomplete"], "config key 'vocab_size' is missing"),
        (["info", "{}/absent"], "absent"),
        (["kv", "{}", "--context", "many"], "'many' is not a positive whole number"),
        (["kv", "{}", "--context", "0"], "'0' is not a positive whole number"),
        (
            ["kv", "{}", "--tp", "3"],
            "num_attention_heads 4 is not divisible by the tensor parallel size 3",
        ),
        (["kv", "{}", "--context", "9" * 400], "is more than anything holds"),
        (["kv", "{}/list"], "config.json is not a JSON object"),
        (["info", "{}[/b]"], "[/b]"),
        (["kv", "{}", "--tp", "0"], "Invalid value for '--tp'"),
        (["kv", "{}", "--kv-cache-dtype", "int3"], "'int3' is not one of"),
        (["kv"], "Missing argument"),
        (["convert", "{}/absent", "{}/new"], "holds no weights"),
        (["convert", "{}/config.json", "{}/new"], "holds no weights"),
        (["convert", "{}/cut-short", "{}/new"], "params.json is not JSON"),
        (["convert", "{}", "{}/new", "--dtype", "int8"], "'int8' is not one of"),
        (["upcycle", "{}", "{}/new", "--iterations", "2"], "of model_type 'yoco_u': upcycle makes YOCO-U from 'llama'"),
        (["upcycle", "{}/absent", "{}/new", "--iterations", "2"], "has no config.json"),
        (["upcycle", "{}/broken", "{}/new", "--iterations", "2"], "config.json is not JSON"),
        (["upcycle", "{}/other", "{}/new", "--iterations", "2"], "holds no weights"),
        (["upcycle", "{}/other", "{}/new", "--iterations", "0"], "Invalid value for '--iterations'"),
        (["upcycle", "{}/other", "{}/new", "--iterations", "2", "--self-from", "3-"], "'3-' is neither a number"),
        (["upcycle", "{}/other", "{}/new", "--iterations", "2", "--cross-from", "9-3"], "'9-3' is neither a number"),
        (["upcycle", "{}/other", "{}/new", "--iterations", "2", "--self-layers", "32"], "choose --self-layers between"),
        (["check", "{}/other"], "is of model_type 'llama': give a checkpoint of 'yoco_u'"),
        (["check", "--dtype", "int8"], "'int8' is not one of"),
        (["check", "--tensor-parallel-size", "0"], "Invalid value for '--tensor-parallel-size'"),
        (["kv", "{}", "--nonsense"], "No such option"),
        (["nonsense"], "No such command"),
    ],
)
def test_errors_are_one_line(arguments, complaint, checkpoint, capsys, monkeypatch):
    arguments = [argument.format(checkpoint) for argument in arguments]
    code, printed, error = run(capsys, monkeypatch, *arguments)
    assert code == 2 and printed == "" and len(error.splitlines()) == 1
    assert error.startswith("vllm-yocou: ") and complaint in error
