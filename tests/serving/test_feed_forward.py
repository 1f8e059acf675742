"""Mixtures of experts in vLLM are the reference's: gated, plain or no shared expert; routed anew in every iteration."""

import pytest
import torch
from harness import tiny
from harness.checkout import needs_compiler
from harness.engines import generate
from harness.oracle import agrees

PROMPTS = [tiny.prompt(length) for length in (1, 16, 17, 50, 333)]


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
