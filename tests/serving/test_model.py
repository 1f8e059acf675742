"""The served model against the reference, in float32 and in this process, for every variant of the architecture.

One engine a variant: chunks of an odd number of tokens, a pool of blocks that cannot hold all requests, prefix caching.
"""

import pytest
import torch
from harness import processor, tiny
from harness.checkout import TRAINED
from harness.engines import CONTEXT, generate, kv_cache_config, metric, model_runner
from harness.oracle import Oracle, agrees

from vllm_yocou.reference import YocoUForCausalLM

# Most tiny models fit into one window group; these are made to have several, also of uneven sizes.
OPTIONS = {
    "T3-S3-C2-qknorm-interleaved-W7": {"max_global_block": 64},
    "T5-S2-C1-linear-qknorm-W1": {"max_global_block": 32},
}
GROUPS = {"T3-S3-C2-qknorm-interleaved-W7": [1, 3, 3, 3], "T5-S2-C1-linear-qknorm-W1": [1, 2, 2, 3, 3]}
PROMPTS = [tiny.prompt(length) for length in (1, 50, 333)]


class Served:
    """An engine over a random checkpoint, and the model that it must agree with."""

    def __init__(self, engine, folder, variant: str):
        self.model = tiny.model(tiny.config(**tiny.VARIANTS[variant]))
        self.model.save_pretrained(folder, max_shard_size="200KB")
        assert (folder / "model.safetensors.index.json").exists()
        self.sizes = GROUPS.get(variant)
        options = {"yocou": OPTIONS.get(variant, {})}
        self.llm = engine(folder, kv_cache_memory_bytes=self.pool_bytes(), additional_config=options)

    def pool_bytes(self) -> int:
        """Room for little more than one context of global KV and its windows."""
        cfg = self.model.config
        window = cfg.num_key_value_heads * cfg.head_dim * cfg.num_iterations * cfg.num_self_decoder_layers
        return int(1.3 * 4 * 2) * (cfg.cross_num_key_value_heads * cfg.cross_head_dim * CONTEXT + window * 256)

    def check(self, prompts: list[list[int]], **sampling) -> list:
        outputs = generate(self.llm, prompts, **sampling)
        agrees(self.model, prompts, outputs)
        return outputs

    @property
    def groups(self) -> list:
        return kv_cache_config(self.llm).kv_cache_groups

    @property
    def global_block(self) -> int:
        return max(group.kv_cache_spec.block_size for group in self.groups)


@pytest.fixture(scope="module", params=tiny.VARIANTS)
def served(request, module_engine, tmp_path_factory):
    yield Served(module_engine, tmp_path_factory.mktemp("checkpoint"), request.param)
    module_engine.stop()


def test_lengths_from_one_token_to_twenty_windows(served):
    W = served.model.config.sliding_window
    lengths = {1, 2, 3, W - 1, W, W + 1, 2 * W + 1, 20 * W + 7, 31, 32, 33, 95, 193, 350} - {0}
    prompts = [tiny.prompt(length) for length in sorted(lengths)]
    served.check(prompts, prompt_logprobs=2)


def test_preempted_requests_are_exact(served):
    """Eight requests grow, token by token, until the pool cannot hold them."""
    before = metric(served.llm, "vllm:num_preemptions")
    length = (kv_cache_config(served.llm).num_blocks // 8 + 1) * served.global_block
    served.check([tiny.prompt(40, seed) for seed in range(8)], tokens=length - 39)
    assert metric(served.llm, "vllm:num_preemptions") > before


def test_shared_prefixes_are_exact_and_hit_whole_global_blocks(served):
    block = served.global_block
    shared = tiny.prompt(2 * block + 5, seed=77)
    served.check([shared], tokens=2)
    outputs = served.check([shared + tiny.prompt(length, seed=78) for length in (1, 9, 40)])
    # vLLM's own manager finds no hit for a window of one token; nothing is wrong then, only computed again.
    hit = 2 * block if served.model.config.sliding_window > 1 else 0
    assert [output.num_cached_tokens for output in outputs] == [hit] * 3


def test_window_caches_are_packed_behind_one_global_cache(served):
    cfg = served.model.config
    layers = sorted(len(group.layer_names) for group in served.groups)
    assert layers == (served.sizes or [1, cfg.num_iterations * cfg.num_self_decoder_layers])


def test_iterations_and_window_come_from_the_config_alone(engine, tmp_path):
    """T overridden at load time is the reference at that T, and the global cache inherits no window."""
    model = tiny.model(tiny.config(num_iterations=3))
    model.save_pretrained(tmp_path)
    overridden = YocoUForCausalLM.from_pretrained(tmp_path, num_iterations=2).eval()
    llm = engine(tmp_path, hf_overrides={"num_iterations": 2})
    agrees(overridden, PROMPTS, generate(llm, PROMPTS))
    caches = model_runner(llm).vllm_config.compilation_config.static_forward_context
    assert [cache.sliding_window for cache in caches.values()] == [16] * 4 + [None]
    assert sorted(len(group.layer_names) for group in kv_cache_config(llm).kv_cache_groups) == [1, 4]


def test_embeddings_as_input_and_reloaded_weights_are_exact(engine, tmp_path):
    model = tiny.model(tiny.config(embedding_multiplier=2.5))
    model.save_pretrained(tmp_path)
    llm = engine(tmp_path, enable_prompt_embeds=True)
    embeddings = model.model.embed_tokens.weight.detach()
    # What stands for a token after its embedding: the multiplier is in it.
    inputs = [*PROMPTS, *({"prompt_embeds": 2.5 * embeddings[prompt]} for prompt in PROMPTS)]
    agrees(model, PROMPTS * 2, generate(llm, inputs))

    other = tiny.model(tiny.config(embedding_multiplier=2.5), seed=1)
    other.save_pretrained(tmp_path)
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    agrees(other, PROMPTS, generate(llm, PROMPTS))


def test_sleep_mode_is_refused_on_a_cpu(engine, tmp_path):
    tiny.model(tiny.config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        engine(tmp_path, enable_sleep_mode=True)


def test_a_wrong_checkpoint_is_refused_by_tensor_names(engine, tmp_path):
    tiny.model(tiny.config(qk_norm="self")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: model.cross_decoder.layers.0.cross_attn.q_norm.weight, "):
        engine(tmp_path, hf_overrides={"qk_norm": "all"})


def test_the_bound_can_fail():
    """A reference with another window is far outside the bound."""
    model = tiny.model(tiny.config())
    oracle = Oracle(model)
    right = oracle.log_probabilities(tiny.prompt(60))
    model.config.sliding_window = 17
    wrong = model(torch.tensor([tiny.prompt(60)])).logits[0].log_softmax(-1)
    assert (wrong - right).abs().max() > 100 * 3 * oracle.rounding


def test_the_log_says_what_the_caches_are_and_cost(engine, tmp_path, lines):
    model = tiny.model(tiny.config(num_iterations=5))
    model.save_pretrained(tmp_path)
    options = {"yocou": {"max_global_block": 100, "skip_rows": False}}
    engine(tmp_path, max_model_len=999, additional_config=options)
    # 10 caches in 4 groups: 3, 3, 2, 2. A window of 16 tokens and the token that is computed touch two pages of 32.
    blocks_in_decode, blocks_in_prefill = 4 * 2 + 11, 4 * 3 + 11
    for line in (
        "10 window caches, 3 to a block of 32 tokens, and one global cache in blocks of 96 tokens: 5 KV cache groups, "
        "16.7% of the window blocks unused. Attention backend YOCOU_CPU_ATTN.",
        f"A request of 999 tokens holds {blocks_in_decode * 96 * 512 / 2**20:.1f} MiB of KV cache a rank in decode and "
        f"up to {blocks_in_prefill * 96 * 512 / 2**20:.1f} MiB in prefill",
        "The cross-decoder runs on every prompt row: skip_rows is off.",
    ):
        assert "\n".join(lines).count(line) == 1


def test_a_cache_dtype_that_the_cpu_does_not_read_is_refused(engine, tmp_path):
    tiny.model(tiny.config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"bfloat16"):
        engine(tmp_path, kv_cache_dtype="bfloat16")  # beside float32; vLLM 0.33 refuses it before we do
    with pytest.raises(ValueError, match=r"--kv-cache-dtype int8_per_token_head (cannot be used|is not supported)"):
        engine(tmp_path, kv_cache_dtype="int8_per_token_head")


def test_pooling_reads_every_row(engine):
    """As an embedding model: the mean over all rows, none of which may have skipped the cross-decoder."""
    model = YocoUForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()
    whole = dict(max_model_len=512, max_num_batched_tokens=512)
    llm = engine(TRAINED, runner="pooling", pooler_config={"pooling_type": "MEAN"}, skip_tokenizer_init=False, **whole)
    outputs = llm.embed([{"prompt_token_ids": prompt} for prompt in PROMPTS], use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            mean_D = model.model(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.tensor(output.outputs.embedding), mean_D / mean_D.norm(), atol=1e-5, rtol=0)


def test_without_the_hybrid_manager_it_is_one_group_and_exact(engine, tmp_path, lines):
    model = tiny.model(tiny.config())
    model.save_pretrained(tmp_path)
    llm = engine(tmp_path, disable_hybrid_kv_cache_manager=True)
    (_,) = kv_cache_config(llm).kv_cache_groups
    # Seven caches of 512 bytes a token.
    assert f"a request of {CONTEXT} tokens holds {7 * 512 * CONTEXT / 2**20} MiB a rank" in "".join(lines)
    assert "at a time" not in "".join(lines)  # vLLM counts such caches rightly
    assert "Prefix-cache hits" not in "".join(lines)
    agrees(model, PROMPTS, generate(llm, PROMPTS))


@pytest.mark.skipif(not processor.reads_fp8_caches(), reason="vLLM's FP8 KV cache on a CPU needs AVX-512 or AMX")
@pytest.mark.parametrize("plain_windows", [False, True], ids=["all", "global-only"])
def test_caches_in_fp8(plain_windows, engine, tmp_path):
    """A quarter of float32's bytes; with `--kv-cache-dtype-skip-layers` window and global tokens differ in size."""
    model = tiny.model(tiny.config())
    model.save_pretrained(tmp_path)
    settings = {"kv_cache_dtype_skip_layers": ["sliding_window"]} if plain_windows else {}
    llm = engine(tmp_path, kv_cache_dtype="fp8", **settings)
    groups = kv_cache_config(llm).kv_cache_groups
    bytes_a_token = {group.kv_cache_spec.page_size_bytes // group.kv_cache_spec.block_size for group in groups}
    assert bytes_a_token == ({128, 512} if plain_windows else {128})
    oracle = Oracle(model)
    skipping, scored = generate(llm, PROMPTS), generate(llm, PROMPTS, prompt_logprobs=1)
    for prompt, output, other in zip(PROMPTS, skipping, scored, strict=True):
        # Eight bits change log probabilities, by less where the windows stay as they are; the rows that run do not.
        oracle.compare(prompt, output, greedy=False)
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
    assert 3 * oracle.rounding < oracle.difference < (0.1 if plain_windows else 0.5)
