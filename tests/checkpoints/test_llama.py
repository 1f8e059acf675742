"""A YOCO-U model out of a Llama computes what that does as far as it can; what is not a plain Llama is refused."""

import json
import os
import re

import pytest
import torch
from harness import tiny
from harness.llamas import VOCABULARY, save_llama, upcycle
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vllm_yocou.checkpoints.llama import Layers, Upcycling, choose
from vllm_yocou.checkpoints.plan import plan as plan_of
from vllm_yocou.checkpoints.sources import recognise
from vllm_yocou.checkpoints.write import write
from vllm_yocou.reference import YocoUForCausalLM

TOKENS = torch.randint(0, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def run(model, **settings):
    return model(TOKENS, use_cache=False, **settings)


@pytest.mark.parametrize(
    "changed",
    [
        dict(),
        dict(tie_word_embeddings=True),
        dict(num_attention_heads=3, num_key_value_heads=3, head_dim=None),
        dict(head_dim=8, rope_theta=1e6, shard="40KB"),
        dict(rope_parameters=tiny.LLAMA3_ROPE),
        dict(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}),
    ],
    ids=["grouped", "tied", "mha", "sharded", "llama3", "linear"],
)
def test_with_one_cross_layer_it_is_the_llama(changed, tmp_path):
    """T = 1, RoPE, a window over everything: the last layer reads its own keys and values from the global cache."""
    llama = save_llama(tmp_path / "llama", **changed)
    assert ((tmp_path / "llama" / "model.safetensors.index.json").exists()) == ("shard" in changed)
    upcycle(tmp_path / "llama", tmp_path / "made", self_layers=4)
    made = YocoUForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32).eval()
    expected = run(llama).logits
    torch.testing.assert_close(run(made).logits, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)


def test_more_global_heads_compute_the_same(tmp_path):
    save_llama(tmp_path / "llama")
    logits = []
    for heads in (2, 4):
        plan = upcycle(tmp_path / "llama", tmp_path / str(heads), 2, window=8, global_kv_heads=heads)
        made = YocoUForCausalLM.from_pretrained(tmp_path / str(heads), dtype=torch.float32).eval()
        assert made.config.cross_num_key_value_heads == heads
        logits.append(run(made).logits)
    torch.testing.assert_close(*logits, atol=1e-5 * logits[0].abs().max().item(), rtol=1e-5)
    changes = {step.target: step.change for step in plan.steps if step.change}
    assert changes == {f"model.global_kv.{name}_proj.weight": "each head 2 times" for name in "kv"}
    for heads in (3, 8):
        with pytest.raises(ValueError, match=f"--global-kv-heads is {heads}: .* a multiple of 2 that divides 4"):
            upcycle(tmp_path / "llama", tmp_path / "other", global_kv_heads=heads)


def test_it_is_the_llama_up_to_the_first_cross_layer_and_not_beyond(tmp_path):
    llama = save_llama(tmp_path / "llama")
    upcycle(tmp_path / "llama", tmp_path / "made", self_layers=2, attention_from=(2, 3, 4))
    made = YocoUForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32).eval()
    theirs = run(llama, output_hidden_states=True).hidden_states  # [i]: the input of layer i
    ours = run(made, output_hidden_states=True).hidden_states
    for layer in range(4):
        torch.testing.assert_close(ours[layer], theirs[layer], atol=1e-4, rtol=1e-5)
    assert (ours[4] - theirs[4]).abs().max() > 0.1


def test_a_window_is_the_llama_where_the_window_reaches(tmp_path):
    llama = save_llama(tmp_path / "llama")
    upcycle(tmp_path / "llama", tmp_path / "made", self_layers=4, window=9)
    made = YocoUForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.float32).eval()
    ours, theirs = run(made).logits[0], run(llama).logits[0]
    torch.testing.assert_close(ours[:9], theirs[:9], atol=1e-4, rtol=1e-4)
    assert (ours[9:] - theirs[9:]).abs().amax(-1).min() > 1e-2


# Names here and there for the layers of the test below, written out.
NAMED = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "lm_head.weight": "lm_head.weight",
    "model.norm.weight": "model.norm.weight",
    "model.self_decoder.layers.0.self_attn.k_proj.weight": "model.layers.3.self_attn.k_proj.weight",
    "model.self_decoder.layers.1.mlp.down_proj.weight": "model.layers.0.mlp.down_proj.weight",
    "model.global_kv.norm.weight": "model.layers.2.input_layernorm.weight",
    "model.global_kv.k_proj.weight": "model.layers.2.self_attn.k_proj.weight",
    "model.global_kv.v_proj.weight": "model.layers.2.self_attn.v_proj.weight",
    "model.cross_decoder.layers.0.input_layernorm.weight": "model.layers.1.input_layernorm.weight",
    "model.cross_decoder.layers.0.cross_attn.q_proj.weight": "model.layers.1.self_attn.q_proj.weight",
    "model.cross_decoder.layers.1.cross_attn.o_proj.weight": "model.layers.4.self_attn.o_proj.weight",
    "model.cross_decoder.layers.1.mlp.up_proj.weight": "model.layers.4.mlp.up_proj.weight",
    "model.cross_decoder.layers.2.input_layernorm.weight": "model.layers.0.input_layernorm.weight",
    "model.cross_decoder.layers.2.post_attention_layernorm.weight": "model.layers.1.post_attention_layernorm.weight",
    "model.cross_decoder.layers.2.mlp.gate_proj.weight": "model.layers.1.mlp.gate_proj.weight",
}


def test_chosen_layers(tmp_path):
    """In any order and more than once, in several files."""
    llama = save_llama(tmp_path / "llama").state_dict()
    chosen = dict(self_from=(3, 0), global_from=2, attention_from=(1, 4, 0), cross_from=(4, 4, 1))
    plan = upcycle(tmp_path / "llama", tmp_path / "made", iterations=3, cross_rope=False, shard_bytes=30_000, **chosen)
    files = sorted((tmp_path / "made").glob("*.safetensors"))
    assert len(files) > 3
    made = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(made) == {step.target for step in plan.steps} and set(NAMED) < set(made)
    for here, there in NAMED.items():
        assert torch.equal(made[here], llama[there]), here
    saved = json.loads((tmp_path / "made" / "config.json").read_text())
    expected = dict(num_iterations=3, num_self_decoder_layers=2, num_hidden_layers=5, sliding_window=64)
    assert {key: saved[key] for key in expected} == expected
    assert not saved["cross_decoder_rope"] and saved["rope_parameters"]["rope_theta"] == 5000.0
    assert run(YocoUForCausalLM.from_pretrained(tmp_path / "made").eval()).logits.isfinite().all()


def chosen_of_five(**asked) -> Layers:
    return choose(5, Upcycling(iterations=1, window=8, **asked))


@pytest.mark.parametrize(
    "asked, found",
    [
        (dict(), ([0, 1], 2, [2, 2, 2], [2, 3, 4])),
        (dict(self_layers=4), ([0, 1, 2, 3], 4, [4], [4])),
        (dict(self_from=(0, 3)), ([0, 3], 4, [4], [4])),
        (dict(self_layers=1, cross_from=(2, 4)), ([0], 2, [2, 2], [2, 4])),
        (dict(self_layers=3, global_from=0), ([0, 1, 2], 0, [0, 0], [3, 4])),
        (dict(self_layers=3, attention_from=(1, 4)), ([0, 1, 2], 3, [1, 4], [3, 4])),
    ],
)
def test_what_was_not_asked_for_follows(asked, found):
    layers = chosen_of_five(**asked)
    lists = (list(layers.self_from), layers.global_from, list(layers.attention_from), list(layers.cross_from))
    assert lists == found


@pytest.mark.parametrize("scaled", [dict(), dict(rope_scaling={"type": "linear", "factor": 4.0})], ids=str)
def test_every_source_tensor_is_used_or_named(scaled, tmp_path):
    llama = save_llama(tmp_path / "llama", tie_word_embeddings=True, **scaled)
    weights = llama.state_dict()
    for i in range(5):  # as transformers wrote them in 2023, which divided positions where there was a factor
        weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = 5000.0 ** -(torch.arange(8) / 8)
    save_file({name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "llama" / "model.safetensors")
    plan = upcycle(tmp_path / "llama", tmp_path / "made", self_layers=2, cross_from=(2, 4))
    assert {step.source for step in plan.steps} | set(plan.left_out) == set(weights)
    assert plan.left_out["lm_head.weight"] == "a second copy of the tied embeddings"
    assert plan.left_out["model.layers.0.self_attn.rotary_emb.inv_freq"] == "follows from the config"
    assert plan.left_out["model.layers.3.mlp.up_proj.weight"] == "not asked for"
    assert plan.left_out["model.layers.4.self_attn.k_proj.weight"] == "not asked for"


def test_another_dtype(tmp_path):
    llama = save_llama(tmp_path / "llama")
    upcycle(tmp_path / "llama", tmp_path / "made", dtype="bfloat16")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}
    assert torch.equal(made["lm_head.weight"], llama.lm_head.weight.bfloat16())


def test_tokenizer_template_and_generation_settings_arrive(tmp_path):
    save_llama(tmp_path / "llama").generation_config.save_pretrained(tmp_path / "llama")
    words = Tokenizer(models.WordLevel({"day": 0, "night": 1, "?": 2}, unk_token="?"))
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template=template)
    tokenizer.save_pretrained(tmp_path / "llama")
    upcycle(tmp_path / "llama", tmp_path / "made")
    arrived = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert arrived.encode("night") == [1] and arrived.chat_template == template
    assert (tmp_path / "made" / "generation_config.json").exists()


def edit(folder, keys=(), tensors=()):
    config = json.loads((folder / "config.json").read_text()) | dict(keys)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors") | dict(tensors)
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changed, complaint",
    [
        (dict(keys={"model_type": "mistral"}), "of model_type 'mistral': upcycle makes YOCO-U from 'llama'"),
        (dict(keys={"attention_bias": True}), "'attention_bias' is True"),
        (dict(keys={"mlp_bias": True}), "'mlp_bias' is True"),
        (dict(keys={"hidden_act": "gelu"}), "'hidden_act' is 'gelu'"),
        (dict(keys={"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}), "rope_type is 'dynamic'"),
        (dict(keys={"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_parameters": None}), "rope_type is 'yarn'"),
        (dict(keys={"rope_parameters": {"partial_rotary_factor": 0.5}}), "has 'partial_rotary_factor'"),
        (dict(keys={"quantization_config": {"quant_method": "fp8"}}), "'quantization_config'"),
        (dict(keys={"num_hidden_layers": 6}), "missing: model.layers.5.mlp.down_proj.weight"),
        (dict(keys={"num_hidden_layers": 4}), "unexpected: model.layers.4.input_layernorm.weight"),
        (dict(keys={"hidden_size": 64}), "model.embed_tokens.weight is [97, 48] instead of [97, 64]"),
        (
            dict(tensors={"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
            "unexpected: model.layers.0.self_attn.q",
        ),
        (dict(tensors={"model.layers.2.self_attn.v_proj.weight": None}), "missing: model.layers.2.self_attn.v_proj"),
        (dict(tensors={"model.norm.weight": torch.ones(48, dtype=torch.int8)}), "model.norm.weight is of torch.int8"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused_by_name(changed, complaint, tmp_path):
    save_llama(tmp_path)
    edit(tmp_path, **changed)
    with pytest.raises(ValueError, match=re.escape(complaint)) as refusal:
        upcycle(tmp_path, tmp_path / "made")
    assert len(str(refusal.value).splitlines()) == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "asked, complaint",
    [
        (dict(self_layers=5), "leave 0 of 5 for the cross-decoder"),
        (dict(self_layers=9), "leave 0 of 5 for the cross-decoder"),
        (dict(self_layers=2, self_from=(0,)), "--self-from names 1 layers and --self-layers says 2"),
        (dict(self_from=(0, 5)), "leave 0 of 5"),
        (dict(self_from=(7,), cross_from=(1,)), "self layer 0 is to come from layer 7: the source has"),
        (dict(cross_from=(3, 5)), "cross layer 1 is to come from layer 5"),
        (dict(global_from=5), "global K and V is to come from layer 5"),
        (dict(attention_from=(2, 9, 2)), "cross layer 1 is to come from layer 9"),
        (dict(attention_from=(2, 3)), "--attention-from names 2 layers for 3 cross layers"),
    ],
)
def test_layers_that_do_not_go_together_are_refused(asked, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        chosen_of_five(**asked)


def test_a_failure_leaves_nothing(tmp_path):
    save_llama(tmp_path / "llama")
    plan = plan_of(recognise("upcycle", tmp_path / "llama", Upcycling(iterations=2, window=8)), tmp_path / "made")

    def full(written):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write(plan, 30_000, full)
    assert os.listdir(tmp_path) == ["llama"]
