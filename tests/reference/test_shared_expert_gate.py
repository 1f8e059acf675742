"""A checkpoint is loaded from where it is said to be, and its own weights say whether shared experts are gated."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import tiny
from harness.hub import ask, hub_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from vllm_yocou.reference import YocoUForCausalLM, YocoUModel

IDS = torch.tensor([tiny.prompt(20)])
GATE = "mlp.shared_expert_gate.weight"


def saved(folder: Path, gated: bool, seed: int, **settings) -> YocoUForCausalLM:
    """A checkpoint whose config says nothing of the gate, as earlier versions wrote them."""
    model = tiny.model(tiny.moe_config(shared_expert_gate=gated), seed)
    model.config.shared_expert_gate = None
    model.save_pretrained(folder, **settings)
    return model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """One gated model in every kind of place; in some of them another one, without gates, is what a look-up finds."""
    root = tmp_path_factory.mktemp("places")
    gated = saved(root / "v2", True, 1)
    saved(root / "main", False, 0)
    saved(root / "nested" / "inner", True, 1)
    saved(root / "variant", False, 0)
    saved(root / "variant", True, 1, variant="half")
    gated.config.save_pretrained(root / "bin")
    torch.save(gated.state_dict(), root / "bin" / "pytorch_model.bin")
    return SimpleNamespace(root=root, gated=gated, ungated=tiny.model(tiny.moe_config(), 0))


@pytest.fixture
def hub(places, tmp_path, monkeypatch):
    revisions = {("org/m", name): places.root / name for name in ("main", "v2")}
    with hub_of(revisions | {("org/nested", "main"): places.root / "nested"}) as started:
        ask(started, tmp_path / "cache", monkeypatch)
        yield started


ADDRESSES = {
    "revision": ("org/m", dict(revision="v2")),
    "revision and token": ("org/m", dict(revision="v2", token="hf_of_the_test")),
    "cache_dir": ("org/m", dict(revision="v2", cache_dir="{tmp}/elsewhere")),
    "subfolder of a repository": ("org/nested", dict(subfolder="inner")),
    "subfolder": ("{root}/nested", dict(subfolder="inner")),
    "variant": ("{root}/variant", dict(variant="half")),
    "pickle": ("{root}/bin", {}),
    "slash at the end": ("{root}/v2/", {}),
    "dtype": ("{root}/v2", dict(dtype="auto")),
    "config": ("{root}/v2", dict(config="{root}/v2/config.json")),
    "on disk": ("{root}/v2", dict(device_map="auto", max_memory={"cpu": 600_000}, offload_folder="{tmp}/disk")),
}


@torch.no_grad()
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("loader", [YocoUForCausalLM, AutoModelForCausalLM])
def test_it_is_loaded_from_where_it_is_said_to_be(address, loader, places, hub, tmp_path):
    name, settings = ADDRESSES[address]
    roots = dict(root=places.root, tmp=tmp_path)
    settings = {key: value.format(**roots) if isinstance(value, str) else value for key, value in settings.items()}
    loaded, report = loader.from_pretrained(name.format(**roots), **settings, output_loading_info=True)
    assert type(loaded) is YocoUForCausalLM and loaded.config.shared_expert_gate is True
    assert not any(report.values())
    torch.testing.assert_close(loaded(IDS).logits, places.gated(IDS).logits, rtol=0, atol=1e-5)
    assert hub.tokens == ({settings["token"]} if "token" in settings else set())
    if "cache_dir" in settings:
        assert (tmp_path / "elsewhere").exists() and not (tmp_path / "cache").exists()
    main = hub.commit("org/m", "main")
    assert not [path for path in hub.downloads() if main in path or "/m/resolve/main/" in path]


@torch.no_grad()
def test_what_is_in_the_cache_is_asked_for_again_only_by_force(places, hub):
    for _ in range(2):
        YocoUForCausalLM.from_pretrained("org/m", revision="v2")
    assert len([path for path in hub.downloads() if "safetensors" in path]) == 1
    hub.requests.clear()
    loaded = YocoUForCausalLM.from_pretrained("org/m", revision="v2", local_files_only=True)
    assert [path for _, path in hub.requests if "org/m" in path] == []
    torch.testing.assert_close(loaded(IDS).logits, places.gated(IDS).logits, rtol=0, atol=1e-5)
    with pytest.raises(OSError, match="cached files"):
        YocoUForCausalLM.from_pretrained("org/m", local_files_only=True)
    YocoUForCausalLM.from_pretrained("org/m", revision="v2", force_download=True)
    assert [path for path in hub.downloads() if "safetensors" in path]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, ADDRESSES["on disk"][1]], ids=["in memory", "on disk"])
def test_weights_without_gates_leave_none(places, settings, tmp_path):
    settings = settings | ({"offload_folder": str(tmp_path)} if settings else {})
    loaded, report = YocoUForCausalLM.from_pretrained(places.root / "main", **settings, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.shared_expert_gate is False
    assert [name for name in loaded.state_dict() if GATE in name] == []
    torch.testing.assert_close(loaded(IDS).logits, places.ungated(IDS).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_model_without_a_head_and_a_state_dict_alone(places):
    config = AutoConfig.from_pretrained(places.root / "v2")
    expected = places.gated.model(IDS).last_hidden_state
    alone = YocoUForCausalLM.from_pretrained(None, config=config, state_dict=places.gated.state_dict())
    for model in (AutoModel.from_pretrained(places.root / "v2", config=config), alone.model):
        assert type(model) is YocoUModel and model.config.shared_expert_gate is True
        torch.testing.assert_close(model(IDS).last_hidden_state, expected, rtol=0, atol=1e-5)
    assert config.shared_expert_gate is None


def test_what_is_saved_says_whether_there_is_a_gate(places, tmp_path):
    models = {
        True: YocoUForCausalLM.from_pretrained(places.root / "v2"),
        False: YocoUForCausalLM.from_pretrained(places.root / "main"),
    }
    for number, (gated, model) in enumerate([*models.items(), (False, YocoUForCausalLM(tiny.moe_config()))]):
        model.save_pretrained(tmp_path / str(number))
        assert json.loads((tmp_path / str(number) / "config.json").read_text())["shared_expert_gate"] is gated


@pytest.mark.parametrize("loader", [AutoModel, AutoModelForCausalLM])
def test_weights_that_contradict_are_refused(loader, places, tmp_path):
    first = f"cross_decoder.layers.0.{GATE} and 3 more"
    with pytest.raises(ValueError, match=rf"lacks .*{first}, and shared_expert_gate is true .* set it to false"):
        loader.from_pretrained(places.root / "main", shared_expert_gate=True)
    with pytest.raises(ValueError, match=rf"holds .*{first}, and shared_expert_gate is false .* set it to true"):
        loader.from_pretrained(places.root / "v2", shared_expert_gate=False)
    tensors = load_file(places.root / "v2" / "model.safetensors")
    del tensors[f"model.self_decoder.layers.1.{GATE}"]
    places.gated.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks .*self_decoder\.layers\.1\.{GATE}, and others of its gates are"):
        loader.from_pretrained(tmp_path)
