"""YOCO-U computed from its definition: one token at a time, plain loops, no cache, float64. It checks the reference.

It reads a state dict by the checkpoint's names and shares no code with the reference model. The keys that only say
what is float32 change nothing here.
"""

import math

import torch


def logits(weights: dict[str, torch.Tensor], config, token_ids: list[int]) -> torch.Tensor:
    """(N, vocab_size) in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = [w["model.embed_tokens.weight"][token] * config.embedding_multiplier for token in token_ids]
    for _ in range(config.num_iterations):
        for i in range(config.num_self_decoder_layers):
            x = self_layer(w, config, i, x)
    keys, values = global_kv(w, config, x)
    for j in range(config.num_hidden_layers - config.num_self_decoder_layers):
        x = cross_layer(w, config, j, x, keys, values)
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return torch.stack([head @ rms_norm(row, w["model.norm.weight"], config) for row in x]) * config.logit_scale


def self_layer(w, config, i: int, x: list) -> list:
    layer = f"model.self_decoder.layers.{i}"
    h = [rms_norm(row, w[f"{layer}.input_layernorm.weight"], config) for row in x]
    queries, keys = query_heads(config, config.num_attention_heads), config.num_key_value_heads
    normed = config.qk_norm in ("self", "all")
    q = projected(w, f"{layer}.self_attn.q", h, queries, config, normed, rope=True)
    k = projected(w, f"{layer}.self_attn.k", h, keys, config, normed, rope=True)
    v = projected(w, f"{layer}.self_attn.v", h, keys, config, normed=False, rope=False)
    attended = attention(q, k, v, config.head_dim, window=config.sliding_window)
    x = attention_added(w, f"{layer}.self_attn", config, x, h, attended)
    return feed_forward(w, config, layer, x, stored=i)


def global_kv(w, config, x: list):
    g = [rms_norm(row, w["model.global_kv.norm.weight"], config) for row in x]
    heads = config.cross_num_key_value_heads
    k = projected(w, "model.global_kv.k", g, heads, config, config.qk_norm == "all", config.cross_decoder_rope)
    return k, projected(w, "model.global_kv.v", g, heads, config, normed=False, rope=False)


def cross_layer(w, config, j: int, x: list, keys: list, values: list) -> list:
    layer = f"model.cross_decoder.layers.{j}"
    h = [rms_norm(row, w[f"{layer}.input_layernorm.weight"], config) for row in x]
    queries, normed = query_heads(config, config.cross_num_attention_heads), config.qk_norm == "all"
    q = projected(w, f"{layer}.cross_attn.q", h, queries, config, normed, config.cross_decoder_rope)
    attended = attention(q, keys, values, config.cross_head_dim, window=len(x))
    x = attention_added(w, f"{layer}.cross_attn", config, x, h, attended)
    return feed_forward(w, config, layer, x, stored=config.num_self_decoder_layers + j)


def query_heads(config, heads: int) -> int:
    return heads if config.differential_attention == "none" else 2 * heads


def attention_added(w, name: str, config, x: list, h: list, attended: list[list]) -> list:
    rows = []
    for row, normed, outputs in zip(x, h, attended, strict=True):
        if config.differential_attention != "none":
            outputs = differences(w[f"{name}.lambda_proj.weight"] @ normed, outputs, config)
        if config.headwise_glu:
            gates = w[f"{name}.gate_proj.weight"] @ normed
            outputs = [sigmoid(gates[i]) * output for i, output in enumerate(outputs)]
        rows.append(row + with_bias(w, f"{name}.o_proj", torch.cat(outputs), config))
    return rows


def differences(gates, outputs: list, config) -> list:
    """v2: o_2i - s(g_i) o_2i+1; v3: s(g_2i) o_2i - s(g_2i+1) o_2i+1, with the sigmoid s."""
    differing = []
    for i in range(len(outputs) // 2):
        if config.differential_attention == "v2":
            differing.append(outputs[2 * i] - sigmoid(gates[i]) * outputs[2 * i + 1])
        else:
            differing.append(sigmoid(gates[2 * i]) * outputs[2 * i] - sigmoid(gates[2 * i + 1]) * outputs[2 * i + 1])
    return differing


def with_bias(w, name: str, row, config):
    product = w[f"{name}.weight"] @ row
    return product + w[f"{name}.bias"] if config.attention_bias else product


def projected(w, name: str, h: list, heads: int, config, normed: bool, rope: bool) -> list[list]:
    """[position][head] -> vector of d."""
    rows = []
    for position, row in enumerate(h):
        vectors = list(with_bias(w, f"{name}_proj", row, config).chunk(heads))
        if normed:
            norm = rms_norm if config.qk_clip_limit is None else rms_clip
            vectors = [norm(vector, w[f"{name}_norm.weight"], config) for vector in vectors]
        if rope:
            vectors = [rotated(vector, position, config) for vector in vectors]
        rows.append(vectors)
    return rows


def rotated(vector, position: int, config):
    d, out = len(vector), vector.clone()
    for pair in range(d // 2):
        frequency = radians_per_position(pair, d, **config.rope_parameters)
        a, b = (2 * pair, 2 * pair + 1) if config.rope_interleaved else (pair, pair + d // 2)
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[a] = vector[a] * cos - vector[b] * sin
        out[b] = vector[b] * cos + vector[a] * sin
    return out


def radians_per_position(
    pair: int,
    d: int,
    rope_type: str,
    rope_theta: float,
    factor=None,
    low_freq_factor=None,
    high_freq_factor=None,
    original_max_position_embeddings=None,
) -> float:
    if rope_type == "yoco2024":
        return rope_theta ** -(pair / (d // 2 - 1))
    frequency = rope_theta ** (-2 * pair / d)
    if rope_type == "linear":
        return frequency / factor
    if rope_type == "llama3":
        wavelength = 2 * math.pi / frequency
        longest, shortest = (original_max_position_embeddings / f for f in (low_freq_factor, high_freq_factor))
        if wavelength > longest:
            return frequency / factor
        if wavelength > shortest:
            part = (original_max_position_embeddings / wavelength - low_freq_factor) / (
                high_freq_factor - low_freq_factor
            )
            return (1 - part) * frequency / factor + part * frequency
    return frequency


def attention(q: list, k: list, v: list, d: int, window: int) -> list[list]:
    """[position][query head] -> vector of d."""
    group = len(q[0]) // len(k[0])
    rows = []
    for position, heads in enumerate(q):
        visible = range(max(0, position - window + 1), position + 1)
        outputs = []
        for head, query in enumerate(heads):
            scores = torch.stack([query @ k[past][head // group] / math.sqrt(d) for past in visible])
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            outputs.append(sum(weight * v[past][head // group] for weight, past in zip(weights, visible, strict=True)))
        rows.append(outputs)
    return rows


def feed_forward(w, config, layer: str, x: list, stored: int) -> list:
    h = [rms_norm(row, w[f"{layer}.post_attention_layernorm.weight"], config) for row in x]
    block = experts if config.num_experts and stored >= config.first_k_dense_replace else swiglu
    return [row + block(w, f"{layer}.mlp", normed, config) for row, normed in zip(x, h, strict=True)]


def swiglu(w, name: str, h, config):
    gates, ups = w[f"{name}.gate_proj.weight"] @ h, w[f"{name}.up_proj.weight"] @ h
    if config.swiglu_limit is not None:
        limit = config.swiglu_limit
        gates = torch.where(gates > limit, limit, gates)
        ups = torch.where(ups.abs() > limit, ups.sign() * limit, ups)
    return w[f"{name}.down_proj.weight"] @ (gates * sigmoid(gates) * ups)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def experts(w, name: str, h, config):
    scores = torch.exp(w[f"{name}.gate.weight"] @ h)
    scores = scores / scores.sum()
    chosen = sorted(range(config.num_experts), key=lambda e: -scores[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    z = h
    if config.moe_latent_size:
        z = w[f"{name}.fc1_latent_proj.weight"] @ h
        if config.moe_latent_norm:
            z = rms_norm(z, w[f"{name}.fc1_latent_norm.weight"], config)
    out = sum(scores[e] / total * swiglu(w, f"{name}.experts.{e}", z, config) for e in chosen)
    if config.moe_latent_size:
        if config.moe_latent_norm:
            out = rms_norm(out, w[f"{name}.fc2_latent_norm.weight"], config)
        out = w[f"{name}.fc2_latent_proj.weight"] @ out
    if config.shared_expert_intermediate_size:
        gate = w.get(f"{name}.shared_expert_gate.weight")
        share = 1.0 if gate is None else sigmoid(gate[0] @ h)
        out = out + share * swiglu(w, f"{name}.shared_expert", h, config)
    return out


def rms_clip(x, weight, config):
    """A vector whose root mean square exceeds the limit is shrunk to it, others stay; the weight scales both."""
    return x * min(1.0, config.qk_clip_limit / torch.sqrt((x * x).mean() + config.rms_norm_eps)) * weight


def rms_norm(x, weight, config):
    return x / torch.sqrt((x * x).mean() + config.rms_norm_eps) * weight
