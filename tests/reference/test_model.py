"""The reference model against the definition (naive.py), and against itself where two computations must agree."""

import pytest
import torch
from harness import naive, tiny
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from vllm_yocou.reference import YocoUCache, YocoUForCausalLM

# float64 logits of two models with equal weights. Bit equality is not promised: where the weights lie in memory may
# change the order in which a processor sums (see test_saved_and_loaded_by_the_auto_class).
TWO_COPIES = 1e-12


@pytest.fixture(params=tiny.CONFIGS, scope="module")
def double(request) -> YocoUForCausalLM:
    return tiny.model(tiny.CONFIGS[request.param]).double()


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([tiny.prompt(length, seed)])


@torch.no_grad()
def test_reference_is_the_definition(double):
    tokens = ids(21)
    expected = naive.logits(double.state_dict(), double.config, tokens[0].tolist())
    torch.testing.assert_close(double(tokens).logits[0], expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(53,), (1,) * 53, (7, 1, 1, 30, 14), (16, 16, 16, 5), (15, 17, 21)])
def test_cached_equals_uncached(double, chunks):
    tokens, cache, parts = ids(53), YocoUCache(double.config), []
    for part in tokens.split(chunks, dim=1):
        parts += [double(part, past_key_values=cache, use_cache=True).logits]
    torch.testing.assert_close(torch.cat(parts, 1), double(tokens).logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_cache_holds_a_window_for_each_iteration_and_layer_and_one_global(double):
    cfg = double.config
    cache = double(ids(53), use_cache=True).past_key_values
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    windows = cfg.num_iterations * cfg.num_self_decoder_layers
    assert lengths == [min(53, cfg.sliding_window - 1)] * windows + [53]


@torch.no_grad()
@pytest.mark.parametrize("past", [15, 16, 17])
def test_a_token_sees_exactly_its_window(past):
    """With one self layer, T = 1 and W = 16, token n feels token n - 15 in its global KV and not token n - 16."""
    cfg = tiny.config(num_hidden_layers=2, num_self_decoder_layers=1, num_iterations=1, sliding_window=16)
    model = tiny.model(cfg).double()
    tokens = ids(40)
    changed = tokens.clone()
    changed[0, 30 - past] = (changed[0, 30 - past] + 1) % tiny.VOCABULARY
    keys = [model(t, use_cache=True).past_key_values.layers[-1].keys[0, :, 30] for t in (tokens, changed)]
    assert torch.equal(*keys) == (past >= 16)


@torch.no_grad()
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_looped_equals_unrolled_with_copied_weights(iterations):
    """T = 1 is plain YOCO, so a model of T·S self layers and T = 1 is the loop written out."""
    looped = tiny.model(tiny.config(num_iterations=iterations)).double()
    S, C = looped.config.num_self_decoder_layers, looped.config.num_cross_decoder_layers
    cfg = tiny.config(num_iterations=1, num_self_decoder_layers=iterations * S, num_hidden_layers=iterations * S + C)
    unrolled = YocoUForCausalLM(cfg).double().eval()
    weights = looped.state_dict()
    for name in unrolled.state_dict():
        parts = name.split(".")
        if parts[1] == "self_decoder":
            parts[3] = str(int(parts[3]) % S)
        unrolled.get_parameter(name).copy_(weights[".".join(parts)])
    torch.testing.assert_close(looped(ids(40)).logits, unrolled(ids(40)).logits, rtol=0, atol=TWO_COPIES)


@torch.no_grad()
def test_another_window_is_another_model():
    """The comparisons above could not fail if the window did not matter."""
    base = tiny.model(tiny.config(sliding_window=16)).double()
    wider = YocoUForCausalLM(tiny.config(sliding_window=17)).double().eval()
    wider.load_state_dict(base.state_dict())
    tokens = ids(60)
    assert (base(tokens).logits - wider(tokens).logits).abs().max() > 1e-2
    torch.testing.assert_close(base(tokens[:, :16]).logits, wider(tokens[:, :16]).logits, rtol=0, atol=TWO_COPIES)


@torch.no_grad()
def test_attention_implementations_agree():
    model = tiny.model(tiny.config()).double()
    sdpa = model(ids(40)).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids(40)).logits, sdpa, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mapping_of_masks_is_the_plain_mask(implementation):
    """transformers' interface for hybrid models; the batch is padded on the left."""
    model = tiny.model(tiny.config())
    model.set_attn_implementation(implementation)
    tokens = ids(80).view(2, 40)
    plain = torch.ones_like(tokens)
    plain[0, :13] = 0
    arguments = (model.config, model.get_input_embeddings()(tokens), plain, None)
    masks = {
        "sliding_attention": create_sliding_window_causal_mask(*arguments),
        "full_attention": create_causal_mask(*arguments),
    }
    expected = model(tokens, attention_mask=plain).logits
    torch.testing.assert_close(model(tokens, attention_mask=masks).logits, expected, rtol=0, atol=0)
    del masks["full_attention"]
    with pytest.raises(ValueError, match="attention_mask has no 'full_attention': give a mask for each"):
        model(tokens, attention_mask=masks)


@torch.no_grad()
def test_attentions_have_one_entry_for_each_layer_pass():
    model = tiny.model(tiny.config())
    with pytest.raises(ValueError, match=r"output_attentions cannot be used with attn_implementation='sdpa': .*eager"):
        model(ids(40), output_attentions=True)
    model.set_attn_implementation("eager")
    cfg = model.config
    weights = model(ids(40), output_attentions=True).attentions
    seen = [W for W, passes in ((16, 6), (40, cfg.num_cross_decoder_layers)) for _ in range(passes)]
    assert [int((w[0, 0, -1] > 0).sum()) for w in weights] == seen
    for weights_BHNL in weights:
        torch.testing.assert_close(weights_BHNL.sum(-1), torch.ones(1, 4, 40))


def test_a_call_without_tokens_is_refused():
    model = tiny.model(tiny.config())
    with pytest.raises(ValueError, match="there is no token to compute: give at least one"):
        model(ids(9)[:, :0])
    embeddings = model.get_input_embeddings()(ids(9))
    with pytest.raises(ValueError, match="prefill_chunk_size needs input_ids"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=2, prefill_chunk_size=4)


@torch.no_grad()
def test_generate_is_greedy_decoding_of_the_uncached_model():
    model = tiny.model(tiny.config())
    tokens = ids(19)
    generated = model.generate(tokens, max_new_tokens=25, do_sample=False)
    for _ in range(25):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    assert generated.tolist() == tokens.tolist()
    beams = dict(max_new_tokens=12, num_beams=3, do_sample=False)
    assert model.generate(ids(19), **beams).tolist() == model.generate(ids(19), **beams, use_cache=False).tolist()


@torch.no_grad()
def test_generate_ignores_left_padding():
    model = tiny.model(tiny.config(pad_token_id=0))
    short, long = ids(9, seed=1), ids(30, seed=2)
    batch = torch.cat([F.pad(short, (21, 0), value=0), long])
    mask = torch.cat([F.pad(torch.ones_like(short), (21, 0)), torch.ones_like(long)])
    padded = model.generate(batch, attention_mask=mask, max_new_tokens=20, do_sample=False)[:, 30:]
    for row, tokens in zip(padded, (short, long), strict=True):
        alone = model.generate(tokens, max_new_tokens=20, do_sample=False)[0, tokens.shape[1] :]
        assert row.tolist() == alone.tolist()


def test_training_loss_and_gradient_checkpointing():
    model = tiny.model(tiny.config()).train()
    tokens = ids(33)
    output = model(tokens, labels=tokens)
    expected = F.cross_entropy(output.logits[0, :-1], tokens[0, 1:])
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close(dtype):
    model = tiny.model(tiny.config())
    exact = model(ids(40)).logits.log_softmax(-1)
    rounded = model.to(dtype)(ids(40)).logits.float().log_softmax(-1)
    assert (exact - rounded).abs().max() < 0.5
    assert (exact - rounded).abs().mean() < 0.05


@torch.no_grad()
@pytest.mark.parametrize("name", ["T2-S1-C3-llama3-tied-W33", "moe", "moe-gated-shared"])
def test_saved_and_loaded_by_the_auto_class(tmp_path, name):
    model = tiny.model(tiny.CONFIGS[name])
    if name == "moe-gated-shared":
        model.config.shared_expert_gate = None  # the format says it by the weight alone
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is YocoUForCausalLM
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    # Equal weights do not give equal bits: loaded ones lie in the mapped file, 8 bytes off the alignment of memory that
    # torch allocates. Where an expert gets a single row, torch's library multiplies a matrix by a vector, and on some
    # processors the order of that sum depends on the matrix's alignment (up to 1.3e-6 here; larger products never).
    torch.testing.assert_close(loaded(ids(20)).logits, model(ids(20)).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_hidden_states_have_one_entry_for_each_layer_pass():
    model = tiny.model(tiny.config())
    passes = model.config.num_iterations * model.config.num_self_decoder_layers + model.config.num_cross_decoder_layers
    assert len(model(ids(5), output_hidden_states=True).hidden_states) == passes + 1


def test_a_foreign_cache_is_refused():
    from transformers import DynamicCache

    with pytest.raises(ValueError, match=r"past_key_values is a DynamicCache: .* pass a YocoUCache"):
        tiny.model(tiny.config())(ids(5), past_key_values=DynamicCache(), use_cache=True)
