"""The switches of the authors' family: served, each alone and all together, they are what the reference computes."""

import pytest
import torch
from harness import tiny, traced
from harness.checkout import needs_compiler
from harness.engines import generate, model_runner
from harness.half_precision import HalfPrecision
from harness.oracle import agrees, check
from vllm.compilation.counter import compilation_counter

from vllm_yocou.architecture import Architecture

LENGTHS = (1, 16, 17, 50, 333)
PROMPTS = [tiny.prompt(length) for length in LENGTHS]
PRODUCTION = "moe-v3-latent"
# A dense model with all that a dense model can have at a time.
DENSE = dict(
    differential_attention="v2",
    attention_bias=True,
    residual_in_fp32=True,
    logit_scale=0.5,
    cross_num_attention_heads=6,
    cross_num_key_value_heads=3,
    **tiny.CLIP,
    **tiny.CLAMP,
)


def saved(config, folder):
    model = tiny.model(config)
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


def holds(llm, model) -> None:
    """Prompts whose rows skip the cross-decoder, prompts whose every row runs, and the same from the prefix cache."""
    for sampling in ({}, {"prompt_logprobs": 1}, {}):
        outputs = generate(llm, PROMPTS, **sampling)
        agrees(model, PROMPTS, outputs)
    assert any(output.num_cached_tokens for output in outputs) == (model.config.sliding_window > 1)


def test_a_dense_model_is_exact(engine, tmp_path):
    model = saved(tiny.config(**DENSE), tmp_path)
    holds(engine(tmp_path), model)


@needs_compiler
def test_the_production_shape_is_exact_and_traced_without_breaks(engine, tmp_path, monkeypatch):
    """In two graphs, of a pass through the self-decoder and of the cross-decoder; vLLM refuses one with a break."""
    graphs = traced.install(monkeypatch)
    seen = compilation_counter.num_models_seen
    model = saved(tiny.LINEAGE[PRODUCTION], tmp_path)
    holds(engine(tmp_path, compilation_config={"mode": 3}), model)
    assert compilation_counter.num_models_seen == seen + 2
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("yocou_looped_experts" in name for name in names) == model.config.num_hidden_layers


def test_what_is_float32_in_a_model_of_16_bits(engine, tmp_path):
    """Router and stream; a model in float32 could not tell. What the others compute has 16 bits."""
    oracle = HalfPrecision(tiny.model(tiny.LINEAGE[PRODUCTION]), torch.bfloat16)
    oracle.stored.save_pretrained(tmp_path)
    llm = engine(tmp_path, dtype="bfloat16", enable_prefix_caching=False)
    served, stored = model_runner(llm).model.model, oracle.stored.model
    streams, scores = [], []
    for layer in (*served.self_decoder.layers, *served.cross_decoder.layers):
        layer.register_forward_hook(lambda module, args, x: streams.append((args[1].dtype, x.dtype)))
        layer.input_layernorm.register_forward_hook(lambda module, args, h: streams.append((args[0].dtype, h.dtype)))
    router = stored.self_decoder.layers[0].mlp.gate.weight
    assert not torch.equal(router, router.bfloat16().float())
    served.self_decoder.layers[0].mlp.gate.register_forward_hook(
        lambda module, args, logits: scores.append((logits[0], args[0].float() @ router.T))
    )
    for prompt, output in zip(PROMPTS, generate(llm, PROMPTS, prompt_logprobs=2), strict=True):
        oracle.compare(prompt, output)
    oracle.check()
    wide, half = torch.float32, torch.bfloat16
    assert streams and set(streams) == {(wide, wide), (wide, half)}
    for given, expected in scores:
        assert given.dtype == wide
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [0, pytest.param(3, marks=needs_compiler)], ids=["eager", "compiled"])
@pytest.mark.parametrize("variant", tiny.AUTHORS)
def test_a_variant_is_exact(variant, mode, engine, nightly, tmp_path):
    model = saved(tiny.AUTHORS[variant], tmp_path)
    options = {"yocou": {"max_global_block": 192}}  # so short that the longest prompt finds hits
    holds(engine(tmp_path, compilation_config={"mode": mode}, additional_config=options), model)


def splits(config: Architecture) -> bool:
    try:
        config.check_ranks(2)
    except ValueError:
        return False
    return True


def requests() -> list[dict]:
    return [{"prompt": prompt, "sampling": {"prompt_logprobs": 2} if i % 2 else {}} for i, prompt in enumerate(PROMPTS)]


# None: compiled where vLLM would.
@pytest.mark.parametrize("variant, mode", [*((name, 0) for name in tiny.AUTHORS), (PRODUCTION, None)])
@pytest.mark.parametrize("engine_process", ["two-ranks"], indirect=True)
def test_two_ranks_are_exact(variant, mode, engine_process, nightly, tmp_path):
    """A bias is added once, pairs of heads stay together, and latent experts are summed before they are normed."""
    config = tiny.AUTHORS[variant]
    assert splits(config)
    model = saved(config, tmp_path)
    (batch,) = engine_process.run(tmp_path, [requests()], compilation_config={"mode": mode})
    check(model, requests(), batch.outputs)


@pytest.mark.parametrize("engine_process, mode", [("v2", 0), ("v1-graphs", 3)], indirect=["engine_process"])
@pytest.mark.parametrize("variant", [PRODUCTION, "dense-v2-clip"])
def test_other_runners_are_exact(variant, engine_process, mode, nightly, tmp_path):
    """vLLM's V2 runner, and pieces of compiled code that replay the addresses of their first call."""
    model = saved(tiny.LINEAGE[variant], tmp_path)
    (batch,) = engine_process.run(tmp_path, [requests()[:4]], compilation_config={"mode": mode})
    check(model, requests()[:4], batch.outputs)
