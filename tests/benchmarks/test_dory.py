"""Dory beside YOCO-U: two looped models, of which one mode depends on where chunks end."""

from importlib import import_module

import pytest
import torch
from harness import tiny
from harness.engines import model_runner
from vllm import ModelRegistry

from benchmarks.prober import Prober
from benchmarks.results import Result
from benchmarks.tables.catalogue import TABLES
from benchmarks.tables.comparisons import OURS

TOKENS, CHUNK = 100, 37


def moved_by_chunks(llm) -> float:
    """The largest difference of a prompt's log probabilities, in nats, between one chunk and several."""
    prober = Prober(llm, TOKENS, others=0, longest=60, chunks=(CHUNK,))
    whole, cut = prober.afresh(prober.prompts), prober.afresh(prober.prompts, chunk=CHUNK)
    return max(abs(one - other) for (_, one), (_, other) in zip(whole, cut, strict=True))


def fill(model: torch.nn.Module, scale: float) -> None:
    """Weights that make a difference, where vLLM's dummy ones are next to zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.data.fill_(scale)


def test_chunks_do_not_move_yoco_u(engine, tmp_path):
    tiny.model(tiny.config(num_iterations=2)).save_pretrained(tmp_path)
    assert moved_by_chunks(engine(tmp_path, max_num_batched_tokens=TOKENS + 1, enable_prefix_caching=True)) < 1e-5


@pytest.mark.newer
@pytest.mark.skipif("DoryForCausalLM" not in ModelRegistry.get_supported_archs(), reason="vLLM 0.32 has no Dory")
@pytest.mark.parametrize("mode, depends", [("per_loop", False), ("last_loop", True)])
def test_chunks_move_dory_where_loops_share_a_cache(mode, depends, engine, tmp_path):
    """Each loop reads the last loop's keys of earlier chunks, and its own of this one."""
    config = import_module("vllm.transformers_utils.configs.dory").DoryConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=4,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        n_recurrent_layers=2,
        n_output_layers=2,
        n_recurrent_loops=2,
        ngpt_alpha_init=0.5,
        recurrent_kv_cache_mode=mode,
        architectures=["DoryForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    llm = engine(tmp_path, load_format="dummy", max_num_batched_tokens=TOKENS + 1, enable_prefix_caching=True)
    model = model_runner(llm).model
    fill(model, config.initializer_range)
    model.lm_head.logit_scale.data.mul_(20)  # its hidden states have a norm of one
    moved = moved_by_chunks(llm)
    assert moved > 1e-3 if depends else moved < 1e-5


def test_the_table_says_nothing_of_the_paper():
    """Its ratios are of other models."""
    settings = dict(shape="57M", sizes="tiny", dtype="float32", mode="eager", rounds={1024: 1}, steps=8)
    settings |= dict(batches=[1], budget_gib=1, groups={OURS: 3, "Dory": 9}, chunks={OURS: 1024, "Dory": 4096})
    result = Result("dory", "", settings)
    for model, seconds in ((OURS, 1.0), ("Dory", 2.0)):
        result.add("first token", "s", seconds, tokens=1024, model=model)
        result.add("decode step", "s", seconds / 100, tokens=1024, model=model, batch=1)
        result.add("KV cache", "MiB", 8 * seconds, tokens=1024, model=model)
    assert "paper" not in TABLES["dory"].note(result)
    assert TABLES["dory"].rows(result)[1][1][:6] == [1024, "Dory", "512 (2.00 s)", "2.00x", "50.0", "2.00x"]
