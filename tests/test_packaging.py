"""What `pip install .` puts on a machine."""

import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "-w", str(folder)]
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
    assert {"cpu", "eval", "test", "ray", "bench"} <= extras
