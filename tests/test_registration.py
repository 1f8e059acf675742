"""The plugin may run in anybody's vLLM process: cheap, repeatable, silent, and never an exception."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from vllm_yocou import registration


def test_entry_point_is_the_registration():
    (found,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "yocou")
    assert found.load() is registration.register


def test_registering_again_changes_nothing():
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    registration.register()
    hooks, architectures = dict(MODELS_CONFIG_MAP), set(ModelRegistry.get_supported_archs())
    assert registration.ARCHITECTURE in hooks and registration.ARCHITECTURE in architectures
    registration.register()
    assert hooks == MODELS_CONFIG_MAP and architectures == set(ModelRegistry.get_supported_archs())


def test_registration_touches_no_other_model_and_imports_nothing_else():
    program = """
import logging, sys
import torch
import vllm.config
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
before = dict(MODELS_CONFIG_MAP), dict(ModelRegistry.models), list(AttentionBackendEnum)
loaded = set(sys.modules)
from vllm_yocou.registration import ARCHITECTURE, register
register()
after = dict(MODELS_CONFIG_MAP), dict(ModelRegistry.models), list(AttentionBackendEnum)
assert after[0].pop(ARCHITECTURE) and after[1].pop(ARCHITECTURE)
assert before == after
assert not torch.cuda.is_initialized()
ours = {name for name in sys.modules if name.startswith("vllm_yocou")}
expected = {"registration", "architecture", "config", "config_keys", "options", "rope", "workarounds"}
expected |= {"serving", "serving.batch_invariance", "serving.chunk", "serving.connectors", "serving.engine_settings"}
expected |= {"auto_classes"}
expected |= {"seams", "seams.behaviour", "seams.check", "seams.seam", "seams.settings"}
assert ours == {"vllm_yocou"} | {f"vllm_yocou.{name}" for name in expected}, ours
assert set(sys.modules) - loaded == ours
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unsupported_vllm_gets_one_line(monkeypatch, lines):
    monkeypatch.setattr(registration, "vllm_version", lambda: (0, 31, 2))
    monkeypatch.setattr(registration, "_register", lambda: pytest.fail("registered in spite of the version"))
    registration.register()
    (line,) = lines
    assert "with vLLM 0.31.2: it supports vLLM 0.32 and 0.33, install one of these" in line


def test_a_failure_is_a_line_and_not_an_exception(monkeypatch, lines):
    def broken():
        raise ImportError("something moved")

    monkeypatch.setattr(registration, "_register", broken)
    registration.register()
    (line,) = lines
    assert "could not register" in line and "something moved" in line
