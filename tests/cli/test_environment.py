"""A bug report holds what its form asks for, on every kind of machine, and no secret."""

import json
import os
import subprocess
import sys

import pytest

from vllm_yocou import __version__
from vllm_yocou.cli import environment

X86 = """processor : 0
model name : AMD EPYC 9R14
flags : fpu avx2 avx512f avx512_bf16 amx_nothing

processor : 1
model name : another
flags : fpu
"""
ARM = """processor : 0
Features : fp asimd bf16 i8mm sve2
CPU implementer : 0x41
"""


def test_a_report_is_json_and_complete():
    report = json.loads(json.dumps(environment.describe()))
    assert set(report) == {"versions", "platform", "processor", "settings"}
    assert set(report["versions"]) == {"vllm_yocou", "vllm", "torch", "transformers", "triton", "python"}
    assert report["versions"]["vllm_yocou"] == __version__
    assert report["versions"]["torch"] and report["platform"]["system"] and report["processor"]["cores"] > 0
    assert report["settings"]["OMP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]


def test_an_absent_package_has_no_version(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    assert environment.versions()["no-such-package"] is None


@pytest.mark.parametrize(
    "cpuinfo, name, features",
    [
        (X86, "AMD EPYC 9R14", ["avx2", "avx512f", "avx512_bf16"]),
        (ARM, "", ["neon", "bf16", "i8mm"]),
        (None, "", []),
    ],
    ids=["x86", "arm", "no-proc"],
)
def test_the_first_core_speaks_for_the_processor(cpuinfo, name, features, tmp_path):
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    found = environment.processor(tmp_path / "cpuinfo")
    assert (found["name"], found["features"]) == (name, features)


def test_settings_without_secrets():
    environ = {
        "VLLM_API_KEY": "hunter2",
        "VLLM_Hf_Token_PATH": "hunter2",
        "VLLM_SECRET": "hunter2",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_TOKEN": "hunter2",
        "HOME": "/root",
    }
    found = environment.settings(environ)
    assert set(found) == set(environ) - {"HF_TOKEN", "HOME"}
    assert (found["VLLM_LOGGING_LEVEL"], found["CUDA_VISIBLE_DEVICES"]) == ("DEBUG", "")
    assert "hunter2" not in str(found)


@pytest.mark.parametrize(
    "script, names",
    [("echo NVIDIA A; echo NVIDIA B", ["NVIDIA A", "NVIDIA B"]), ("echo no driver; exit 9", []), (None, [])],
    ids=["two", "no-driver", "no-tool"],
)
def test_gpus_are_those_the_driver_names(script, names, tmp_path, monkeypatch):
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpus() == names


def test_a_report_imports_neither_torch_nor_vllm():
    program = "import sys; from vllm_yocou.cli.environment import describe; describe(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "vllm_yocou.cli.environment" in loaded and not {"torch", "vllm", "transformers"} & set(loaded)
