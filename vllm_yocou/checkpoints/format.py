"""The tensors of a YOCO-U checkpoint: their names and shapes follow from the config alone.

Layers are stored once, however large T is. Nothing here imports torch: what a model costs is counted from this table.
"""

from vllm_yocou.architecture import Architecture

NAMED = 6  # tensors that an error lists by name before it counts the rest


def expected_shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint; matrices are (out, in) as in torch.nn.Linear."""
    D, V = config.hidden_size, config.vocab_size
    K, d = config.num_key_value_heads, config.head_dim
    Kc, dc = config.cross_num_key_value_heads, config.cross_head_dim
    self_norms = config.qk_norm in ("self", "all")
    cross_norms = config.qk_norm == "all"

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config.num_self_decoder_layers):
        layer = f"model.self_decoder.layers.{i}"
        shapes |= _layer_shapes(layer, config, config.has_experts(i))
        shapes |= _query_shapes(f"{layer}.self_attn", config, config.num_attention_heads, config.num_query_heads, d)
        shapes |= _key_value_shapes(f"{layer}.self_attn", config, K * d)
        if self_norms:
            shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (d,)
    shapes["model.global_kv.norm.weight"] = (D,)
    shapes |= _key_value_shapes("model.global_kv", config, Kc * dc)
    if cross_norms:
        shapes["model.global_kv.k_norm.weight"] = (dc,)
    for j in range(config.num_cross_decoder_layers):
        layer = f"model.cross_decoder.layers.{j}"
        shapes |= _layer_shapes(layer, config, config.has_experts(config.num_self_decoder_layers + j))
        shapes |= _query_shapes(
            f"{layer}.cross_attn", config, config.cross_num_attention_heads, config.cross_num_query_heads, dc
        )
        if cross_norms:
            shapes[f"{layer}.cross_attn.q_norm.weight"] = (dc,)
    return shapes


def undecided_shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Of the tensors of which a checkpoint has all or none, where its config leaves that to them: the gates' names."""
    if not config.leaves_gate_to_weights:
        return {}
    sides = (("self", config.num_self_decoder_layers), ("cross", config.num_cross_decoder_layers))
    layers = [f"model.{side}_decoder.layers.{i}" for side, count in sides for i in range(count)]
    with_experts = (layer for number, layer in enumerate(layers) if config.has_experts(number))
    return {f"{layer}.mlp.shared_expert_gate.weight": (1, config.hidden_size) for layer in with_experts}


def can_be_quantized(matrix: str) -> bool:
    """Whether the matrix of this name, without its ending, may be stored quantized: gates of heads may not."""
    return not matrix.endswith((".lambda_proj", "_attn.gate_proj"))


def _query_shapes(prefix: str, config: Architecture, heads: int, queries: int, d: int) -> dict[str, tuple[int, ...]]:
    """Of an attention with `queries` heads, of whose outputs o_proj reads `heads`, all of size `d`."""
    D = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.q_proj.weight": (queries * d, D)}
    shapes[f"{prefix}.o_proj.weight"] = (D, heads * d)
    if config.is_differential:
        shapes[f"{prefix}.lambda_proj.weight"] = (queries if config.differential_attention == "v3" else heads, D)
    if config.headwise_glu:
        shapes[f"{prefix}.gate_proj.weight"] = (heads, D)
    return shapes | _biases(config, {f"{prefix}.q_proj": queries * d, f"{prefix}.o_proj": D})


def _key_value_shapes(prefix: str, config: Architecture, width: int) -> dict[str, tuple[int, ...]]:
    widths = {f"{prefix}.k_proj": width, f"{prefix}.v_proj": width}
    return {f"{name}.weight": (width, config.hidden_size) for name in widths} | _biases(config, widths)


def _biases(config: Architecture, widths: dict[str, int]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.bias": (width,) for name, width in widths.items()} if config.attention_bias else {}


def _layer_shapes(layer: str, config: Architecture, has_experts: bool) -> dict[str, tuple[int, ...]]:
    D, E, width, latent = (
        config.hidden_size,
        config.num_experts,
        config.moe_intermediate_size,
        config.moe_latent_size,
    )
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}.input_layernorm.weight": (D,),
        f"{layer}.post_attention_layernorm.weight": (D,),
    }
    if E is None or width is None or not has_experts:
        return shapes | _swiglu_shapes(f"{layer}.mlp", D, config.intermediate_size)
    shapes[f"{layer}.mlp.gate.weight"] = (E, D)
    for e in range(E):
        shapes |= _swiglu_shapes(f"{layer}.mlp.experts.{e}", latent or D, width)
    if latent is not None:
        shapes[f"{layer}.mlp.fc1_latent_proj.weight"] = (latent, D)
        shapes[f"{layer}.mlp.fc2_latent_proj.weight"] = (D, latent)
        if config.moe_latent_norm:
            shapes[f"{layer}.mlp.fc1_latent_norm.weight"] = (latent,)
            shapes[f"{layer}.mlp.fc2_latent_norm.weight"] = (latent,)
    if config.shared_expert_intermediate_size is not None:
        shapes |= _swiglu_shapes(f"{layer}.mlp.shared_expert", D, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            shapes[f"{layer}.mlp.shared_expert_gate.weight"] = (1, D)
    return shapes


def _swiglu_shapes(prefix: str, D: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, D),
        f"{prefix}.up_proj.weight": (width, D),
        f"{prefix}.down_proj.weight": (D, width),
    }


def stays_float32(config: Architecture, name: str) -> bool:
    """Whether the tensor of this name is float32 whatever the others are: the router's, with `router_in_fp32`."""
    return config.router_in_fp32 and name.endswith(".mlp.gate.weight")


def deviations(missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    """What differs from a config's tensors, the first of each kind by name; empty where nothing does."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    return "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds if names)


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
