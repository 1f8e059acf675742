"""The tensors of a YOCO-U checkpoint: their names and shapes follow from the config alone.

Layers are stored once, however large T is. Nothing here imports torch: what a model costs is counted from this table.
"""

from vllm_yocou.architecture import Architecture

NAMED = 6  # tensors that an error lists by name before it counts the rest


def expected_shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint; matrices are (out, in) as in torch.nn.Linear."""
    D, V = config.hidden_size, config.vocab_size
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    Hc, Kc, dc = config.cross_num_attention_heads, config.cross_num_key_value_heads, config.cross_head_dim
    self_norms = config.qk_norm in ("self", "all")
    cross_norms = config.qk_norm == "all"

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config.num_self_decoder_layers):
        layer = f"model.self_decoder.layers.{i}"
        shapes |= _layer_shapes(layer, config)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (H * d, D)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (K * d, D)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (K * d, D)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (D, H * d)
        if self_norms:
            shapes[f"{layer}.self_attn.q_norm.weight"] = shapes[f"{layer}.self_attn.k_norm.weight"] = (d,)
    shapes["model.global_kv.norm.weight"] = (D,)
    shapes["model.global_kv.k_proj.weight"] = shapes["model.global_kv.v_proj.weight"] = (Kc * dc, D)
    if cross_norms:
        shapes["model.global_kv.k_norm.weight"] = (dc,)
    for j in range(config.num_cross_decoder_layers):
        layer = f"model.cross_decoder.layers.{j}"
        shapes |= _layer_shapes(layer, config)
        shapes[f"{layer}.cross_attn.q_proj.weight"] = (Hc * dc, D)
        shapes[f"{layer}.cross_attn.o_proj.weight"] = (D, Hc * dc)
        if cross_norms:
            shapes[f"{layer}.cross_attn.q_norm.weight"] = (dc,)
    return shapes


def undecided_shapes(config: Architecture) -> dict[str, tuple[int, ...]]:
    """Of the tensors of which a checkpoint has all or none, where its config leaves that to them: the gates' names."""
    if not config.leaves_gate_to_weights:
        return {}
    sides = (("self", config.num_self_decoder_layers), ("cross", config.num_cross_decoder_layers))
    layers = (f"model.{side}_decoder.layers.{i}" for side, count in sides for i in range(count))
    return {f"{layer}.mlp.shared_expert_gate.weight": (1, config.hidden_size) for layer in layers}


def _layer_shapes(layer: str, config: Architecture) -> dict[str, tuple[int, ...]]:
    D, E, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}.input_layernorm.weight": (D,),
        f"{layer}.post_attention_layernorm.weight": (D,),
    }
    if E is None or width is None:
        return shapes | _swiglu_shapes(f"{layer}.mlp", D, config.intermediate_size)
    shapes[f"{layer}.mlp.gate.weight"] = (E, D)
    for e in range(E):
        shapes |= _swiglu_shapes(f"{layer}.mlp.experts.{e}", D, width)
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


def deviations(missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
    """What differs from a config's tensors, the first of each kind by name; empty where nothing does."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    return "; ".join(f"{kind}: {listed(names)}" for kind, names in kinds if names)


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
