"""Mixtures of experts in vLLM are the reference's: gated, plain or no shared expert; routed anew in every iteration."""

import pytest
import torch
from harness import tiny
from harness.checkout import needs_compiler
from harness.engines import generate
from harness.hub import ask, hub_of
from harness.oracle import agrees

PROMPTS = [tiny.prompt(length) for length in (1, 16, 17, 50, 333)]


def hf_config(llm):
    return llm.llm_engine.vllm_config.model_config.hf_config


def saved(folder, **overrides):
    """A checkpoint whose config says nothing of the gate: its weights do."""
    model = tiny.model(tiny.moe_config(**overrides))
    model.config.shared_expert_gate = None
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


# One is compiled by Inductor in `make test`: what it makes of a mixture does not depend on the shared expert's gate.
@pytest.mark.parametrize(
    "variant, mode",
    [
        *((variant, 0) for variant in tiny.MOE_VARIANTS),
        pytest.param("moe-gated-shared", 3, marks=needs_compiler),
        pytest.param("moe", 3, marks=[needs_compiler, pytest.mark.slow]),
        pytest.param("moe-unnormalised", 3, marks=[needs_compiler, pytest.mark.slow]),
    ],
)
def test_mixtures_are_exact(variant, mode, engine, tmp_path):
    model = saved(tmp_path, **tiny.MOE_VARIANTS[variant])
    llm = engine(tmp_path, compilation_config={"mode": mode})
    gated = tiny.MOE_VARIANTS[variant].get("shared_expert_gate", False)
    # What compiled code is kept under, too, depends on the weights by now.
    assert hf_config(llm).shared_expert_gate is (gated if model.config.shared_expert_intermediate_size else None)
    agrees(model, PROMPTS, generate(llm, PROMPTS, prompt_logprobs=1))
    agrees(model, PROMPTS, generate(llm, PROMPTS))


def test_routing_differs_between_iterations():
    """Otherwise no test here could tell fresh routing from a kept one."""
    model, chosen = tiny.model(tiny.moe_config()), []
    gate = model.model.self_decoder.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, args, logits: chosen.append(logits.topk(2).indices.sort().values))
    model(torch.tensor([tiny.prompt(50)]))
    first, second, third = chosen
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("engine_process", ["two-ranks"], indirect=True)
def test_two_ranks_are_exact(engine_process, tmp_path):
    model = saved(tmp_path, shared_expert_gate=True)
    (batch,) = engine_process.run(tmp_path, [[{"prompt": prompt} for prompt in PROMPTS]])
    agrees(model, PROMPTS, batch.outputs)


def test_a_revision_is_served_as_its_own_weights_say(engine, tmp_path, monkeypatch):
    """The main one has no gate, and nothing of it is asked for; weights are only where they are to be downloaded."""
    for name, gated in (("main", False), ("v2", True)):
        model = saved(tmp_path / name, shared_expert_gate=gated)
    cache, downloads = tmp_path / "cache", tmp_path / "downloads"
    with hub_of({("org/moe", name): tmp_path / name for name in ("main", "v2")}) as hub:
        ask(hub, cache, monkeypatch)
        llm = engine("org/moe", revision="v2", download_dir=str(downloads))
    agrees(model, PROMPTS, generate(llm, PROMPTS))
    v2 = hub.commit("org/moe", "v2")
    assert hub.downloads() and [path for path in hub.downloads() if v2 not in path and "/resolve/v2/" not in path] == []
    assert list(downloads.rglob(f"{v2}/*.safetensors")) and not list(cache.rglob("*.safetensors"))


def test_a_gate_that_the_config_says_or_denies(engine, tmp_path):
    model = tiny.model(tiny.moe_config(shared_expert_gate=True))
    model.save_pretrained(tmp_path)
    agrees(model, PROMPTS, generate(engine(tmp_path), PROMPTS))
    with pytest.raises(ValueError, match=r"does not fit its config\.json, unexpected: .*shared_expert_gate\.weight"):
        engine(tmp_path, hf_overrides={"shared_expert_gate": False})
