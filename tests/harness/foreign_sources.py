"""Small checkpoints of the two other YOCO schemas, and what each computes, written down from what its code does.

Shapes: N tokens, D hidden size; weights are read by the sources' names. Nothing here knows of this project's model.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention, silu

# In the trainer's spelling, which exported folders have as well.
AUTHORS = dict(
    model_type="yoco",
    architectures=["YOCOForCausalLM"],
    vocab_size=97,
    n_layers=5,
    yoco_cross_layers=2,
    universal_loop=3,
    yoco_window_size=6,
    head=4,
    kv_head=2,
    head_dim=16,
    cross_head=6,
    cross_kv_head=3,
    cross_head_dim=16,
    d_model=48,
    d_ffn=80,
    norm_eps=1e-5,
    max_seq_len=512,
    weight_tying=False,
    rope_theta=5000.0,
    moe=False,
    diff_attention=False,
    swiglu_limit=0.0,
    eos_token_id=1,
)
EXPERTS = dict(moe=True, moe_expert_num=4, moe_top_k=2, moe_ffn_dim=24, d_shared_expert=40)
AUTHORS_MOE = AUTHORS | EXPERTS
# Every switch of the authors' is on in one of these, and every limit is reached by random weights.
AUTHORS_FAMILY = {
    "dense-original": AUTHORS
    | dict(qk_norm=True, qk_norm_self_only=True, qk_rms_gamma=True, weight_tying=True, tie_word_embeddings=True)
    | dict(logit_scale=0.5, rope_theta=1000.0, yoco_window_size=4),
    "dense-v2-clip": AUTHORS
    | dict(diff_v2=True, head=2, cross_head=3, qk_rms_clip=True, qk_rms_limit=0.4, swiglu_limit=0.3)
    | dict(yoco_window_size=2),
    "moe-june": {key: value for key, value in AUTHORS_MOE.items() if key != "swiglu_limit"}
    | dict(diff_attention=True, qk_norm=True, cross_head=8, cross_kv_head=2),
    "moe-v3-latent": AUTHORS_MOE
    | dict(diff_v3=True, diff_v2=False, qk_norm=False, qk_rms_clip=True, qk_rms_limit=0.5, qk_rms_gamma=True)
    | dict(swiglu_limit=0.4, moe_latent_dim=20, moe_latent_norm=True, router_weights_normalized=True),
    "mixed-v3": AUTHORS_MOE
    | dict(diff_v3=True, qk_norm=True, qk_rms_gamma=True, dense_layers=1, moe_latent_dim=20, universal_loop=1)
    | dict(n_layers=4, yoco_cross_layers=1, yoco_window_size=1, kv_head=1, cross_kv_head=1),
}
# What exported folders have lost.
TRAIN_ONLY = AUTHORS | dict(headwise_glu=True, attention_bias=True)
# The spelling of Hugging Face by the trainer's.
SPELLINGS = dict(
    d_model="hidden_size",
    d_ffn="intermediate_size",
    head="num_attention_heads",
    kv_head="num_key_value_heads",
    n_layers="num_hidden_layers",
    max_seq_len="max_position_embeddings",
    norm_eps="rms_norm_eps",
    yoco_window_size="sliding_window_size",
    moe_expert_num="num_experts",
    moe_top_k="num_experts_per_tok",
    moe_ffn_dim="moe_intermediate_size",
    d_shared_expert="shared_expert_intermediate_size",
)
YOCO2024 = dict(
    dim=48,
    n_layers=4,
    hidden_dim=80,
    n_self_heads=4,
    n_attn_heads=6,
    n_attn_kv_heads=2,
    vocab_size=97,
    sliding_window=7,
    rope_theta=8000.0,
    norm_eps=1e-5,
    max_seq_len=512,
)


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(shapes))
    return {
        f"{name}.weight": torch.randn(shape) * 0.1 if len(shape) == 2 else 0.5 + torch.rand(shape)
        for name, shape in shapes.items()
    }


def respelled(c: dict) -> dict:
    """The same config with Hugging Face's spelling alone where there is one."""
    return {SPELLINGS.get(key, key): value for key, value in c.items()}


def authors_kind(c: dict) -> str | None:
    """Of differential attention, by the first key of theirs that is there."""
    if c.get("diff_v3"):
        return "v3"
    return "v2" if c.get("diff_v2", c.get("diff_attention", True)) else None


def authors_weights(c: dict) -> dict[str, torch.Tensor]:
    """By their served names; biases and gates of heads, which no exported folder has, by names like those."""
    D, d, self_layers = c["d_model"], c["head_dim"], c["n_layers"] - c["yoco_cross_layers"]
    kind, weighted = authors_kind(c), c.get("qk_rms_gamma") and (c.get("qk_rms_clip") or c.get("qk_norm"))
    cross_weighted = weighted and not (c.get("qk_norm_self_only") and not c.get("qk_rms_clip"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (c["vocab_size"], D)}
    shapes["model.norm"] = shapes["model.yoco_norm"] = (D,)
    shapes["model.k_proj"] = shapes["model.v_proj"] = (c["cross_kv_head"] * d, D)
    if cross_weighted:
        shapes["model.yoco_k_norm"] = (d,)
    if not c["weight_tying"]:
        shapes["lm_head"] = (c["vocab_size"], D)
    for i in range(c["n_layers"]):
        attn, is_self = f"model.layers.{i}.self_attn", i < self_layers
        heads = c["head"] if is_self else c["cross_head"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}"] = (D,)
        shapes[f"{attn}.q_proj"], shapes[f"{attn}.o_proj"] = (heads * d * (2 if kind else 1), D), (D, heads * d)
        if is_self:
            shapes[f"{attn}.k_proj"] = shapes[f"{attn}.v_proj"] = (c["kv_head"] * d, D)
        if kind:
            shapes[f"{attn}.lambda_proj"] = (heads * (2 if kind == "v3" else 1), D)
        if c.get("headwise_glu"):
            shapes[f"{attn}.gate_proj"] = (heads, D)
        if weighted if is_self else cross_weighted:
            shapes[f"{attn}.q_norm"] = (d,)
            if is_self:
                shapes[f"{attn}.k_norm"] = (d,)
        shapes |= feed_forward_shapes(c, i)
    weights = random_weights(shapes)
    if c.get("attention_bias"):
        biased = [name for name in shapes if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))]
        weights |= {f"{name}.bias": torch.randn(shapes[name][0]) * 0.3 for name in biased}
    if c.get("router_weights_normalized"):
        routers = [name for name in weights if name.endswith(".mlp.gate.weight")]
        weights |= {name: torch.nn.functional.normalize(weights[name]) for name in routers}
    return {name.replace("_weight.weight", "_weight"): tensor for name, tensor in weights.items()}


def feed_forward_shapes(c: dict, layer: int) -> dict[str, tuple[int, ...]]:
    D, mlp = c["d_model"], f"model.layers.{layer}.mlp"
    E = c.get("moe_expert_num", 0) if layer >= c.get("dense_layers", 0) else 0
    if not E:
        F = c["d_ffn"]
        return {f"{mlp}.gate_proj": (F, D), f"{mlp}.up_proj": (F, D), f"{mlp}.down_proj": (D, F)}
    L, F, shared = c.get("moe_latent_dim", 0), c["moe_ffn_dim"], c["d_shared_expert"]
    X = L or D
    shapes: dict[str, tuple[int, ...]] = {f"{mlp}.gate": (E, D), f"{mlp}.shared_gate": (1, D)}
    shapes |= {f"{mlp}.experts.w13_weight": (E * 2 * F, X), f"{mlp}.experts.w2_weight": (E * X, F)}
    shapes |= {f"{mlp}.shared_experts.gate_up_proj": (2 * shared, D), f"{mlp}.shared_experts.down_proj": (D, shared)}
    if L:
        shapes |= {f"{mlp}.fc1_latent_proj": (L, D), f"{mlp}.fc2_latent_proj": (D, L)}
    if L and c.get("moe_latent_norm"):
        shapes |= {f"{mlp}.fc1_latent_norm": (L,), f"{mlp}.fc2_latent_norm": (L,)}
    return shapes


def authors_logits(c: dict, weights: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """(N, vocab_size) in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    N, d, self_layers = len(tokens), c["head_dim"], c["n_layers"] - c["yoco_cross_layers"]
    past = torch.arange(N)[:, None] - torch.arange(N)
    causal, window = past >= 0, (past >= 0) & (past <= c["yoco_window_size"])  # FlashAttention's (w, 0)
    kind, limit = authors_kind(c), c.get("swiglu_limit", 10.0)
    clips, norms_cross = c.get("qk_rms_clip"), not c.get("qk_norm_self_only")

    def inverse_rms(x):
        return (x.pow(2).mean(-1, keepdim=True) + c["norm_eps"]).rsqrt()

    def norm(name, x):
        return x * inverse_rms(x) * w[f"{name}.weight"]

    def head_norm(name, x, is_self):
        gamma = w.get(f"{name}.weight", 1.0)
        if clips:
            return x * (c.get("qk_rms_limit", 3.0) * inverse_rms(x)).clamp(max=1.0) * gamma
        return x * inverse_rms(x) * gamma if c.get("qk_norm") and (is_self or norms_cross) else x

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def heads(name, x):
        return linear(name, x).unflatten(-1, (-1, d)).transpose(0, 1)

    def rope(x):
        half = d // 2
        angle = torch.arange(N)[:, None] * c["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * cos + turned * sin

    def swiglu(gate, up):
        return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) if limit > 0 else silu(gate) * up

    def routed(mlp, h):
        E = c["moe_expert_num"]
        rows = w[f"{mlp}.gate.weight"]
        share = torch.softmax(h @ (rows / rows.pow(2).sum(-1, keepdim=True).sqrt()).T, -1)
        kept = torch.where(share >= share.topk(c["moe_top_k"]).values[:, -1:], share, 0.0)
        kept = kept / kept.sum(-1, keepdim=True)
        z = linear(f"{mlp}.fc1_latent_proj", h) if c.get("moe_latent_dim") else h
        z = norm(f"{mlp}.fc1_latent_norm", z) if c.get("moe_latent_norm") else z
        first, second = (w[f"{mlp}.experts.{part}_weight"].chunk(E) for part in ("w13", "w2"))
        r = sum(kept[:, e, None] * (swiglu(*(z @ first[e].T).chunk(2, -1)) @ second[e].T) for e in range(E))
        r = norm(f"{mlp}.fc2_latent_norm", r) if c.get("moe_latent_norm") else r
        return linear(f"{mlp}.fc2_latent_proj", r) if c.get("moe_latent_dim") else r

    def feed_forward(layer, x):
        h, mlp = norm(f"{layer}.post_attention_layernorm", x), f"{layer}.mlp"
        if f"{mlp}.down_proj.weight" in w:
            hidden = swiglu(linear(f"{mlp}.gate_proj", h), linear(f"{mlp}.up_proj", h))
            return x + linear(f"{mlp}.down_proj", hidden)
        hidden = swiglu(*linear(f"{mlp}.shared_experts.gate_up_proj", h).chunk(2, -1))
        shared = torch.sigmoid(linear(f"{mlp}.shared_gate", h)) * linear(f"{mlp}.shared_experts.down_proj", hidden)
        return x + routed(mlp, h) + shared

    def attend(layer, x, h, q, k, v, mask):
        out = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(0, 1)  # (N, heads, d)
        if kind:
            gate = torch.sigmoid(linear(f"{layer}.self_attn.lambda_proj", h))[..., None]
            first, second = out[:, ::2], out[:, 1::2]
            both = kind == "v3"
            out = gate[:, ::2] * first - gate[:, 1::2] * second if both else first - gate * second
        elif c.get("headwise_glu"):
            out = out * torch.sigmoid(linear(f"{layer}.self_attn.gate_proj", h))[..., None]
        return x + linear(f"{layer}.self_attn.o_proj", out.flatten(1))

    x = w["model.embed_tokens.weight"][tokens]
    for _ in range(c["universal_loop"]):
        for i in range(self_layers):
            layer = f"model.layers.{i}"
            h = norm(f"{layer}.input_layernorm", x)
            q, k = (
                rope(head_norm(f"{layer}.self_attn.{p}_norm", heads(f"{layer}.self_attn.{p}_proj", h), True))
                for p in "qk"
            )
            x = feed_forward(layer, attend(layer, x, h, q, k, heads(f"{layer}.self_attn.v_proj", h), window))
    g = norm("model.yoco_norm", x)
    keys, values = head_norm("model.yoco_k_norm", heads("model.k_proj", g), False), heads("model.v_proj", g)
    for i in range(self_layers, c["n_layers"]):
        layer = f"model.layers.{i}"
        h = norm(f"{layer}.input_layernorm", x)
        q = head_norm(f"{layer}.self_attn.q_norm", heads(f"{layer}.self_attn.q_proj", h), False)
        x = feed_forward(layer, attend(layer, x, h, q, keys, values, causal))
    head = w["model.embed_tokens.weight" if c["weight_tying"] else "lm_head.weight"]
    return norm("model.norm", x) @ head.T * c.get("logit_scale", 1.0)


def trainer_weights(c: dict, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the trainer's names: heads and experts have dimensions of their own, little is fused."""
    state, d = {}, c["head_dim"]
    top = {"embed_tokens": "tok_embeddings", "yoco_k_norm": "k_norm"}
    for name, tensor in weights.items():
        short = re.sub(r"^model\.", "", name).replace("lm_head", "output").replace("lambda_proj", "gate_proj")
        short = re.sub(r"^(\w+)\.", lambda found: f"{top.get(found[1], found[1])}.", short)
        if re.search(r"[qkv]_proj\.weight$", name):
            tensor = tensor.unflatten(0, (-1, d))
        if re.search(r"[qkv]_proj\.bias$", name):
            tensor = tensor.unflatten(0, (-1, d))
        if "experts.w" in name:
            short = short.replace("experts.", "").removesuffix("_weight")
            tensor = tensor.unflatten(0, (c["moe_expert_num"], -1))
        short = short.replace("shared_experts", "shared")
        if "gate_up_proj" in name:
            for part, rows in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                state[short.replace("gate_up_proj", part)] = rows.clone()
            continue
        state[short] = tensor.clone()
    if c["weight_tying"]:
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def yoco2024_weights(c: dict) -> dict[str, torch.Tensor]:
    D = c["dim"]
    shapes = {"embed_tokens": (c["vocab_size"], D), "output_projection": (c["vocab_size"], D), "layer_norm": (D,)}
    shapes["cross_decoder.kv_layer_norm"] = (D,)
    kv = c["n_attn_kv_heads"] * D // c["n_attn_heads"]
    shapes["cross_decoder.k_proj"] = shapes["cross_decoder.v_proj"] = (kv, D)
    for decoder, parts in (("self", ("q", "k", "v", "out")), ("cross", ("q", "out"))):
        for i in range(c["n_layers"] // 2):
            layer = f"{decoder}_decoder.layers.{i}"
            shapes[f"{layer}.mixer_layer_norm"] = shapes[f"{layer}.final_layer_norm"] = (D,)
            shapes |= {f"{layer}.mixer.{part}_proj": (D, D) for part in parts}
            shapes[f"{layer}.ffn.fc1"] = shapes[f"{layer}.ffn.gate"] = (c["hidden_dim"], D)
            shapes[f"{layer}.ffn.fc2"] = (D, c["hidden_dim"])
    return random_weights(shapes)


def yoco2024_logits(c: dict, w: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    N = len(tokens)
    past = torch.arange(N)[:, None] - torch.arange(N)
    causal, window = past >= 0, (past >= 0) & (past < c["sliding_window"])

    def norm(name, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], w[f"{name}.weight"], c["norm_eps"])

    def project(name, x, d):
        return (x @ w[f"{name}.weight"].T).unflatten(-1, (-1, d)).transpose(0, 1)

    def rope(x):
        frequencies = c["rope_theta"] ** -torch.linspace(0, 1, x.shape[-1] // 2)
        turn = torch.polar(torch.ones(()), torch.arange(N)[:, None] * frequencies)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    def layer_output(layer, x, q, k, v, mask):
        out = scaled_dot_product_attention(rope(q), k, v, mask, enable_gqa=True).transpose(0, 1).flatten(1)
        x = x + out @ w[f"{layer}.mixer.out_proj.weight"].T
        h = norm(f"{layer}.final_layer_norm", x)
        gated = silu(h @ w[f"{layer}.ffn.fc1.weight"].T) * (h @ w[f"{layer}.ffn.gate.weight"].T)
        return x + gated @ w[f"{layer}.ffn.fc2.weight"].T

    x = w["embed_tokens.weight"][tokens] * c["dim"] ** 0.5
    for i in range(c["n_layers"] // 2):
        layer = f"self_decoder.layers.{i}"
        h = norm(f"{layer}.mixer_layer_norm", x)
        q, k, v = (project(f"{layer}.mixer.{part}_proj", h, c["dim"] // c["n_self_heads"]) for part in "qkv")
        x = layer_output(layer, x, q, rope(k), v, window)
    g, d = norm("cross_decoder.kv_layer_norm", x), c["dim"] // c["n_attn_heads"]
    keys, values = rope(project("cross_decoder.k_proj", g, d)), project("cross_decoder.v_proj", g, d)
    for i in range(c["n_layers"] // 2):
        layer = f"cross_decoder.layers.{i}"
        q = project(f"{layer}.mixer.q_proj", norm(f"{layer}.mixer_layer_norm", x), d)
        x = layer_output(layer, x, q, keys, values, causal)
    return norm("layer_norm", x) @ w["output_projection.weight"].T


def save_authors(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> None:
    """In two files, as large checkpoints come."""
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: weights[name] for name in chosen}, folder / f"model-{part:05}-of-00002.safetensors")


def save_trainer(folder: Path, config: dict, state: dict[str, torch.Tensor]) -> None:
    arguments = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    (folder / "metadata.json").write_text(json.dumps({"step": 1000, "modelargs": arguments}))
    torch.save({"model": state}, folder / "model_state_rank_0.pth")


def save_yoco2024(folder: Path, params: dict, weights: dict[str, torch.Tensor]) -> None:
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(weights, folder / "checkpoint.pth")
