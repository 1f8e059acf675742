"""Tiny YOCO-U models with random weights: the one place where the tests get their configs and checkpoints."""

import copy

import torch

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference import YocoUForCausalLM

VOCABULARY = 211
# Llama 3.1's type with a context so short that a few dozen tokens reach every part of its table.
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE["original_max_position_embeddings"] = 64

# Every property of the architecture appears in some variant; the names are the test ids.
VARIANTS = {
    "T1-S2-C2-nope-mha": dict(num_iterations=1, num_attention_heads=2, num_key_value_heads=2, sliding_window=16),
    "T2-S1-C3-llama3-tied-W33": dict(
        num_iterations=2,
        num_self_decoder_layers=1,
        rope_parameters=LLAMA3_ROPE,
        cross_decoder_rope=True,
        qk_norm="self",
        tie_word_embeddings=True,
        sliding_window=33,
        cross_num_attention_heads=2,
        cross_num_key_value_heads=1,
        cross_head_dim=64,
    ),
    "T3-S3-C2-qknorm-interleaved-W7": dict(
        num_hidden_layers=5,
        num_self_decoder_layers=3,
        num_iterations=3,
        qk_norm="all",
        rope_interleaved=True,
        sliding_window=7,
        embedding_multiplier=2.5,
        cross_num_attention_heads=6,
        cross_num_key_value_heads=3,
    ),
    "T5-S2-C1-linear-qknorm-W1": dict(
        num_hidden_layers=3,
        num_self_decoder_layers=2,
        num_iterations=5,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3},
        cross_decoder_rope=True,
        qk_norm="all",
        sliding_window=1,
        # The global page is not a multiple of ten window pages: a sixth of a block stays empty.
        num_key_value_heads=1,
        cross_num_attention_heads=3,
        cross_num_key_value_heads=3,
    ),
    "T2-yoco2024": dict(
        num_iterations=2,
        rope_parameters={"rope_type": "yoco2024", "rope_theta": 10000.0},
        rope_interleaved=True,
        cross_decoder_rope=True,
    ),
}


# Overrides of moe_config: a shared expert without a gate, with a gate, and no shared expert.
MOE_VARIANTS = {
    "moe": dict(),
    "moe-gated-shared": dict(shared_expert_gate=True),
    "moe-unnormalised": dict(norm_topk_prob=False, shared_expert_intermediate_size=None),
}


def config(**overrides) -> YocoUConfig:
    """S = C = 2, T = 3, W = 16, hidden 96, 4 query and 2 KV heads of 32: small, all of them different."""
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=4,
        num_self_decoder_layers=2,
        num_iterations=3,
        sliding_window=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    )
    return YocoUConfig(**sizes | overrides)


def moe_config(**overrides) -> YocoUConfig:
    experts = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=48, shared_expert_intermediate_size=64)
    return config(**experts | overrides)


# Every variant, dense and with experts.
CONFIGS = {name: config(**overrides) for name, overrides in VARIANTS.items()}
CONFIGS |= {name: moe_config(**overrides) for name, overrides in MOE_VARIANTS.items()}


def _small(make=config, **overrides) -> YocoUConfig:
    """One layer in each decoder, T = 2, W = 5."""
    return make(**dict(num_hidden_layers=2, num_self_decoder_layers=1, num_iterations=2, sliding_window=5) | overrides)


# With the random weights below, a third of SwiGLU's factors exceeds the first limit and most heads exceed the second.
CLAMP = dict(swiglu_limit=0.4)
CLIP = dict(qk_norm="all", qk_clip_limit=0.75)
BIAS = dict(attention_bias=True, qk_norm="all")  # without a norm or RoPE the bias of the global keys changes nothing
LATENT = dict(moe_latent_size=64)  # a multiple of 32, which vLLM's experts on a CPU take alone
ROUTED = dict(shared_expert_gate=True, router_in_fp32=True)
# Each of the authors' switches alone.
SWITCHED = {
    "differential-v2": _small(differential_attention="v2"),
    "differential-v3": _small(differential_attention="v3"),
    "headwise-glu": _small(headwise_glu=True),
    "attention-bias": _small(**BIAS),
    "qk-clip": _small(**CLIP),
    "qk-clip-self": _small(**CLIP | dict(qk_norm="self")),
    "clamp": _small(**CLAMP),
    "clamp-moe": _small(moe_config, **CLAMP),
    "dense-self": _small(moe_config, first_k_dense_replace=1),
    "dense-cross": _small(moe_config, num_hidden_layers=3, first_k_dense_replace=2),
    "router-float32": _small(moe_config, router_in_fp32=True),
    "latent": _small(moe_config, **LATENT),
    "latent-norm": _small(moe_config, **LATENT, moe_latent_norm=True),
    "residual-float32": _small(residual_in_fp32=True),
    "logit-scale": _small(logit_scale=0.5),
}
# The authors' models in small, from the first to the one that they serve, and what they only train.
LINEAGE = {
    "dense-original": config(
        qk_norm="self",
        tie_word_embeddings=True,
        logit_scale=0.5,
        rope_theta=1000.0,
        cross_num_attention_heads=2,
        cross_num_key_value_heads=1,
        sliding_window=5,
    ),
    "dense-v2-clip": config(
        differential_attention="v2", num_attention_heads=2, sliding_window=3, residual_in_fp32=True, **CLIP, **CLAMP
    ),
    "moe-june": moe_config(
        differential_attention="v2", qk_norm="all", cross_num_attention_heads=8, sliding_window=9, **ROUTED, **CLAMP
    ),
    "moe-v3-latent": moe_config(
        differential_attention="v3",
        sliding_window=17,
        moe_latent_norm=True,
        residual_in_fp32=True,
        **ROUTED,
        **CLIP,
        **CLAMP,
        **LATENT,
    ),
    "mixed-v3": moe_config(
        differential_attention="v3",
        qk_norm="all",
        first_k_dense_replace=1,
        num_hidden_layers=3,
        num_self_decoder_layers=2,
        num_iterations=1,
        num_key_value_heads=1,
        sliding_window=2,
        residual_in_fp32=True,
        **ROUTED,
        **CLAMP,
        **LATENT,
    ),
    "train-only": config(headwise_glu=True, **BIAS),
}
AUTHORS = SWITCHED | LINEAGE


def model(cfg: YocoUConfig, seed: int = 0) -> YocoUForCausalLM:
    """Random weights large enough that every layer moves the logits; norm weights away from one, biases from zero."""
    torch.manual_seed(seed)
    built = YocoUForCausalLM(copy.deepcopy(cfg)).eval()  # tests set what they like in a model's config, and saving does
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() > 1 or name.endswith(".bias"):
                parameter.normal_(std=0.08)
            else:
                parameter.uniform_(0.5, 1.5)
    return built


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
