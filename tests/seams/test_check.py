"""A newer vLLM with every seam starts with one warning; one without ends in a sentence; other models see neither."""

import importlib
from types import SimpleNamespace

import pytest
from harness import tiny
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.models import registry
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.platforms import current_platform
from vllm.transformers_utils import model_arch_config_convertor

from vllm_yocou import registration
from vllm_yocou.seams import check
from vllm_yocou.seams.attention import GROUPING
from vllm_yocou.seams.seam import Seam
from vllm_yocou.seams.table import SEAMS

SETTINGS = dict(skip_tokenizer_init=True, load_format="dummy", dtype="float32", enforce_eager=True)


@pytest.fixture(autouse=True)
def unchecked():
    """Each test is a new start, which checks the table once."""
    registration.register()
    check.check_all.cache_clear()
    yield
    check.check_all.cache_clear()


@pytest.fixture
def newer(monkeypatch):
    monkeypatch.setattr(check, "vllm_version", lambda: (0, 34, 1))


@pytest.fixture
def without_a_name(monkeypatch):
    """The model class imports this one: vLLM would fail where it inspects the class."""
    monkeypatch.delattr(fused_moe, "GateLinear")


def configure(folder, config) -> VllmConfig:
    config.save_pretrained(folder)
    return EngineArgs(model=str(folder), **SETTINGS).create_engine_config()


def yoco_u(folder) -> VllmConfig:
    return configure(folder, tiny.config(architectures=[registration.ARCHITECTURE]))


def llama(folder, monkeypatch) -> VllmConfig:
    # In this process; vLLM would inspect the class in another one.
    known = registry._RegisteredModel.from_model_cls(LlamaForCausalLM)
    monkeypatch.setitem(registry.ModelRegistry.models, "LlamaForCausalLM", known)
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config.architectures = ["LlamaForCausalLM"]
    return configure(folder, config)


def test_a_tested_version_starts_silently(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(check, "vllm_version", lambda: (*check.TESTED_VLLM[-1], 1))
    yoco_u(tmp_path)
    assert not [line for line in lines if "tested" in line]


def test_a_newer_version_with_every_seam_starts_with_one_warning(tmp_path, lines, newer):
    for _ in range(2):
        yoco_u(tmp_path)
    (line,) = (line for line in lines if "tested" in line)
    assert "is tested with vLLM 0.32 and 0.33, and this is 0.34.1" in line


@pytest.mark.usefixtures("without_a_name")
def test_a_missing_seam_ends_that_start_in_a_sentence(tmp_path, newer):
    with pytest.raises(ValueError, match="vllm-yocou") as error:
        yoco_u(tmp_path)
    sentence = next(line for line in str(error.value).splitlines() if "vllm-yocou" in line)
    assert (
        "vLLM 0.34.1 cannot serve YOCO-U" in sentence
        and "no vllm.model_executor.layers.fused_moe:GateLinear" in sentence
    )
    assert "install vLLM 0.32 or 0.33, or a newer vllm-yocou" in sentence


@pytest.mark.usefixtures("without_a_name")
def test_other_models_are_not_touched(tmp_path, lines, newer, monkeypatch):
    registration.register()
    assert llama(tmp_path, monkeypatch).model_config.architecture == "LlamaForCausalLM"
    assert lines == []


def test_registration_without_one_of_its_own_seams_says_which(monkeypatch, lines, newer):
    monkeypatch.delattr(model_arch_config_convertor, "MODEL_ARCH_CONFIG_CONVERTORS")
    registration.register()
    (line,) = lines
    assert "no vllm.transformers_utils.model_arch_config_convertor:MODEL_ARCH_CONFIG_CONVERTORS" in line


@pytest.mark.parametrize(
    "version, old, tested",
    [
        ((0, 31, 2), True, False),
        ((0, 32, 0), False, True),
        ((0, 33, 1), False, True),
        ((0, 34, 0), False, False),
        ((1, 0, 0), False, False),
        ((0, 0), False, False),  # a build of vLLM's sources that knows no version
    ],
)
def test_versions(version, old, tested):
    assert (check.is_too_old(version), check.is_tested(version)) == (old, tested)


@pytest.mark.parametrize("sizes", [(1,) * 6, (5, 1)])
def test_another_packing_rule_ends_that_start_in_a_sentence(sizes, tmp_path, monkeypatch, newer):
    """One group a cache is what vLLM would do with caches of one size."""
    place = next(place for place in GROUPING.places if Seam(place, "", "").missing() is None)
    module, _, name = place.partition(":")
    groups = [SimpleNamespace(layer_names=list(range(size))) for size in sizes]
    monkeypatch.setattr(importlib.import_module(module), name, lambda vllm_config, specs: groups)
    with pytest.raises(
        ValueError, match=r"window caches are packed into few groups, and it has another packing rule in"
    ):
        yoco_u(tmp_path)


@pytest.mark.parametrize("device, others", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_device_needs_no_seam_of_the_other(device, others, monkeypatch):
    checked = []
    monkeypatch.setattr(check, "check", checked.extend)
    monkeypatch.setattr(current_platform, "device_type", device)
    check.check_all()
    assert {seam for seam in SEAMS if seam.only == others} == set(SEAMS) - set(checked) != set()
