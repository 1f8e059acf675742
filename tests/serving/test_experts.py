"""Mixtures of experts in vLLM are the reference's: gated, plain or no shared expert; routed anew in every iteration."""

import pytest
import torch
from harness import engine_process, tiny
from harness.checkout import needs_compiler
from harness.engines import generate, start, stop
from harness.oracle import Oracle

LENGTHS = (1, 16, 17, 50, 333)


def saved(folder, **overrides):
    """A checkpoint whose config says nothing of the gate: its weights do."""
    model = tiny.model(tiny.moe_config(**overrides))
    model.config.shared_expert_gate = None
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


def check(model, outputs) -> None:
    oracle = Oracle(model)
    for length, output in zip(LENGTHS, outputs, strict=True):
        oracle.compare(tiny.prompt(length), output)
    oracle.check()


@pytest.mark.parametrize("mode", [0, pytest.param(3, marks=needs_compiler)], ids=["eager", "compiled"])
@pytest.mark.parametrize("variant", tiny.MOE_VARIANTS)
def test_mixtures_are_exact(variant, mode, tmp_path):
    model = saved(tmp_path, **tiny.MOE_VARIANTS[variant])
    llm = start(tmp_path, kv_cache_memory_bytes=64 << 20, compilation_config={"mode": mode})
    prompts = [tiny.prompt(length) for length in LENGTHS]
    check(model, generate(llm, prompts, prompt_logprobs=1))
    check(model, generate(llm, prompts))
    stop(llm)


def test_routing_differs_between_iterations():
    """Otherwise no test here could tell fresh routing from a kept one."""
    model, chosen = tiny.model(tiny.moe_config()), []
    gate = model.model.self_decoder.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, args, logits: chosen.append(logits.topk(2).indices.sort().values))
    model(torch.tensor([tiny.prompt(50)]))
    first, second, third = chosen
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_two_ranks_are_exact(tmp_path):
    model = saved(tmp_path, shared_expert_gate=True)
    (batch,) = engine_process.run(
        tmp_path,
        [[{"prompt": tiny.prompt(length)} for length in LENGTHS]],
        **engine_process.TWO_RANKS,
    )
    check(model, batch.outputs)
