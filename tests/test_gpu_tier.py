"""The GPU tier itself: it says what became of each part, whatever becomes of it, and asks what exists."""

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from gpu import __main__ as tier
from gpu import parts
from gpu.part import Outcome, Part, Verdict, run
from harness.checkout import ROOT
from typer.testing import CliRunner

from benchmarks.tables.catalogue import TABLES
from vllm_yocou.cli.command_line import app
from vllm_yocou.cli.environment import describe

PYTHON = (sys.executable, "-c")
ENDLESS = "import subprocess, sys, time; print('begun', flush=True); subprocess.Popen(['sleep', '60']); time.sleep(60)"


@pytest.mark.parametrize(
    "command, read, holds, text",
    [
        ("print('first'); print('5 passed')", None, True, "5 passed"),
        ("import sys; print('out'); sys.exit('no such kernel')", None, False, "exit code 1; the end of it.err:"),
        ("print('4 skipped in 1.00s')", parts.of_pytest, False, "exit code 0; 4 skipped"),
        ("print('1')", lambda written: Verdict(False, f"not {written.strip()}"), False, "exit code 0; not 1"),
        ("import os; os.abort()", json.loads, False, "exit code -6; it wrote nothing"),
    ],
    ids=["right", "wrong", "all skipped", "read as wrong", "killed"],
)
def test_a_part_says_what_became_of_it(command, read, holds, text, tmp_path):
    found = run(Part("it", (*PYTHON, command), 60, {}, *([read] if read else [])), tmp_path, 60)
    assert found.holds is holds and found.text.startswith(text) and (tmp_path / "it.out").exists()


def test_a_part_that_takes_too_long_is_cut_with_its_children(tmp_path):
    began_s = time.monotonic()
    found = run(Part("an endless one", (*PYTHON, ENDLESS), 2), tmp_path, 60)
    assert not found.holds and found.text == "cut after 2 s; begun"
    assert time.monotonic() - began_s < 30
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()
    assert "sleep 60" not in running


def test_what_is_left_out_or_has_no_time_says_so(tmp_path):
    left_out = run(Part("two ranks", why_not="there is one GPU"), tmp_path, 60)
    assert left_out.line() == "left out two ranks: there is one GPU"
    assert run(Part("late", (*PYTHON, "")), tmp_path, 1) == Outcome("late", False, "not asked, the time is over")


def test_verdicts_are_printed_as_they_come_and_decide_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", "")
    asked = [Part("one", (*PYTHON, "print('yes')"), 60), Part("other", (*PYTHON, "raise SystemExit(3)"), 60)]
    monkeypatch.setattr(parts, "quick", lambda gpus, folder: iter(asked[:1]))
    assert tier.main(["--results", str(tmp_path)]) == 0
    assert "every part holds" in capsys.readouterr().out
    monkeypatch.setattr(parts, "quick", lambda gpus, folder: iter(asked))
    assert tier.main(["--results", str(tmp_path)]) == 1
    head, *verdicts, end, _ = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in verdicts] == [["holds", "one"], ["FAILS", "other"]]
    assert end.startswith("1 of 2 parts failed") and str(tmp_path) in head
    kept = json.loads((tmp_path / "tier.json").read_text())
    assert [part["holds"] for part in kept["parts"]] == [True, False] and kept["machine"]["versions"]["vllm"]


def test_vllm_finds_the_plugin_of_this_tree_without_an_installed_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    tier.announce_plugin(tmp_path)
    program = (
        "from importlib.metadata import entry_points\n"
        "from importlib.util import find_spec\n"
        "print([point.load().__module__ for point in entry_points(group='vllm.general_plugins')])\n"
        "print(find_spec('vllm_yocou.kernels').origin)"
    )
    # Without the packages of this environment, among which the plugin is installed; the tier works in this tree.
    command = [sys.executable, "-S", "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    plugins, kernels = found.stdout.splitlines()
    assert plugins == "['vllm_yocou.registration']" and Path(kernels).resolve() == ROOT / "kernels" / "__init__.py"


def test_pytest_finds_the_kernels_without_an_installed_plugin(nightly, tmp_path, monkeypatch):
    """This environment's packages come by path alone, so that nothing says where an editable installation is."""
    monkeypatch.setenv("PYTHONPATH", sysconfig.get_path("purelib"))
    tier.announce_plugin(tmp_path)
    command = [sys.executable, "-S", *parts.PYTEST[1:], "--collect-only", "tests/kernels/test_global_write.py"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    assert found.returncode == 0 and "collected" in found.stdout, found.stdout


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_parts_ask_what_exists(gpus, tmp_path, monkeypatch):
    """Options of the check, tables and folders; what runs them is a GPU, or the rehearsal below."""
    asked = [*parts.quick(gpus, tmp_path), *parts.more(gpus, tmp_path)]
    assert len({part.slug for part in asked}) == len(asked)
    given = []
    import vllm_yocou.self_check.check as module

    monkeypatch.setattr(module, "check", lambda machine, settings, *rest: given.append(settings) or sys.exit(0))
    for part in asked:
        if part.command[:4] == parts.CHECK[:4]:
            found = CliRunner().invoke(app, part.command[3:])
            assert found.exit_code == 0, found.output
        elif part.command[:3] == (sys.executable, "-m", "benchmarks"):
            assert part.command[3] in TABLES
        elif part.command:
            module_or_folder = part.command[-1] if "pytest" in part.command else "benchmarks/gpu_speed.py"
            assert (ROOT / module_or_folder).exists()
    if gpus:
        modes = [(it.attention_backend, it.dtype, it.compilation_config, it.enforce_eager) for it in given[:5]]
        assert modes == [
            ("FLASH_ATTN", "bfloat16", {}, False),
            ("FLASH_ATTN", "bfloat16", {"cudagraph_mode": "PIECEWISE"}, False),
            ("FLASH_ATTN", "bfloat16", {}, True),
            ("TRITON_ATTN", "float32", {}, False),
            ("TRITON_ATTN", "float32", {}, True),
        ]
    assert ("there is one GPU" in [part.why_not for part in asked]) == (gpus == 1)


def test_every_case_that_runs_apart_is_asked_for_once(nightly):
    command = [*parts.PYTEST, "--collect-only", *(f"tests/gpu/{file}" for file in parts.APART)]
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    given = os.environ | {"PYTHONPATH": paths}
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=given).stdout
    items = [line for line in found.splitlines() if line.startswith("tests/gpu/")]
    for file, cases in parts.APART.items():
        names = [item.partition("::")[2] for item in items if item.startswith(f"tests/gpu/{file}")]
        asked = [[name for name in names if case in name] for case in cases]
        assert all(asked) and sorted(name for some in asked for name in some) == sorted(names)


def test_other_graphs_than_those_asked_for_are_wrong():
    report = {"exact": True, "verdict": "exact: ...", "models": [{"facts": {"cudagraph_mode": "PIECEWISE"}}]}
    assert parts.of_check("PIECEWISE")(json.dumps(report)) == Verdict(True, "exact: ...")
    assert not parts.of_check("NONE")(json.dumps(report)).holds


def test_a_rehearsal(starts_vllm, nightly, both_cores, tmp_path):
    """The same commands on a CPU; a machine with a GPU runs the tier itself."""
    if describe()["platform"]["gpus"]:
        pytest.skip("this machine has a GPU: make gpu")
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    ended = subprocess.run(
        [sys.executable, "-m", "gpu", "--all", "--results", str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("\nholds ") == 7 and "| 200 | YOCO-U |" in ended.stdout
