"""Small checkpoints of the two other YOCO schemas, and what each computes, written down from what its code does.

Shapes: N tokens, D hidden size; weights are read by the sources' names. Nothing here knows of this project's model.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import scaled_dot_product_attention, silu

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
    cross_head_dim=8,
    d_model=48,
    d_ffn=80,
    norm_eps=1e-5,
    max_seq_len=512,
    weight_tying=False,
    rope_theta=5000.0,
    moe=False,
    diff_attention=False,
    eos_token_id=1,
)
AUTHORS_MOE = AUTHORS | dict(moe=True, moe_expert_num=4, moe_top_k=2, moe_ffn_dim=24, d_shared_expert=40)
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


def authors_weights(c: dict) -> dict[str, torch.Tensor]:
    D, self_layers = c["d_model"], c["n_layers"] - c["yoco_cross_layers"]
    shapes = {"model.embed_tokens": (c["vocab_size"], D), "model.norm": (D,), "model.yoco_norm": (D,)}
    shapes["model.k_proj"] = shapes["model.v_proj"] = (c["cross_kv_head"] * c["cross_head_dim"], D)
    if not c["weight_tying"]:
        shapes["lm_head"] = (c["vocab_size"], D)
    for i in range(c["n_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm"] = shapes[f"{layer}.post_attention_layernorm"] = (D,)
        heads, d = (c["head"], c["head_dim"]) if i < self_layers else (c["cross_head"], c["cross_head_dim"])
        shapes[f"{layer}.self_attn.q_proj"], shapes[f"{layer}.self_attn.o_proj"] = (heads * d, D), (D, heads * d)
        if i < self_layers:
            shapes[f"{layer}.self_attn.k_proj"] = shapes[f"{layer}.self_attn.v_proj"] = (c["kv_head"] * d, D)
        widths = {"": c["d_ffn"]}
        if c["moe"]:
            shapes[f"{layer}.mlp.gate"] = (c["moe_expert_num"], D)
            shapes[f"{layer}.mlp.shared_expert_gate"] = (1, D)
            widths = {f"experts.{e}.": c["moe_ffn_dim"] for e in range(c["moe_expert_num"])}
            widths["shared_expert."] = c["d_shared_expert"]
        for part, width in widths.items():
            shapes[f"{layer}.mlp.{part}gate_proj"] = shapes[f"{layer}.mlp.{part}up_proj"] = (width, D)
            shapes[f"{layer}.mlp.{part}down_proj"] = (D, width)
    return random_weights(shapes)


def authors_logits(c: dict, w: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    N, self_layers = len(tokens), c["n_layers"] - c["yoco_cross_layers"]
    past = torch.arange(N)[:, None] - torch.arange(N)
    causal, window = past >= 0, (past >= 0) & (past <= c["yoco_window_size"])  # FlashAttention's (w, 0)

    def norm(name, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + c["norm_eps"]).rsqrt() * w[f"{name}.weight"]

    def project(name, x, d):
        return (x @ w[f"{name}.weight"].T).unflatten(-1, (-1, d)).transpose(0, 1)

    def rope(x):
        half = c["head_dim"] // 2
        angle = torch.arange(N)[:, None] * c["rope_theta"] ** (-torch.arange(half) / half)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * cos + turned * sin

    def mlp(name, x):
        hidden = silu(x @ w[f"{name}gate_proj.weight"].T) * (x @ w[f"{name}up_proj.weight"].T)
        return hidden @ w[f"{name}down_proj.weight"].T

    def feed_forward(layer, x):
        h = norm(f"{layer}.post_attention_layernorm", x)
        if not c["moe"]:
            return x + mlp(f"{layer}.mlp.", h)
        share = torch.softmax(h @ w[f"{layer}.mlp.gate.weight"].T, -1)
        kept = torch.where(share >= share.topk(c["moe_top_k"]).values[:, -1:], share, 0.0)
        kept = kept / kept.sum(-1, keepdim=True)
        routed = sum(kept[:, e, None] * mlp(f"{layer}.mlp.experts.{e}.", h) for e in range(c["moe_expert_num"]))
        gate = torch.sigmoid(h @ w[f"{layer}.mlp.shared_expert_gate.weight"].T)
        return x + routed + gate * mlp(f"{layer}.mlp.shared_expert.", h)

    def attend(layer, x, q, k, v, mask):
        out = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        return x + out.transpose(0, 1).flatten(1) @ w[f"{layer}.self_attn.o_proj.weight"].T

    x = w["model.embed_tokens.weight"][tokens]
    for _ in range(c["universal_loop"]):
        for i in range(self_layers):
            layer, d = f"model.layers.{i}", c["head_dim"]
            h = norm(f"{layer}.input_layernorm", x)
            q, k, v = (project(f"{layer}.self_attn.{part}_proj", h, d) for part in "qkv")
            x = feed_forward(layer, attend(layer, x, rope(q), rope(k), v, window))
    g, d = norm("model.yoco_norm", x), c["cross_head_dim"]
    keys, values = project("model.k_proj", g, d), project("model.v_proj", g, d)
    for i in range(self_layers, c["n_layers"]):
        layer = f"model.layers.{i}"
        q = project(f"{layer}.self_attn.q_proj", norm(f"{layer}.input_layernorm", x), d)
        x = feed_forward(layer, attend(layer, x, q, keys, values, causal))
    head = w["model.embed_tokens.weight" if c["weight_tying"] else "lm_head.weight"]
    return norm("model.norm", x) @ head.T


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


def save_yoco2024(folder: Path, params: dict, weights: dict[str, torch.Tensor]) -> None:
    (folder / "params.json").write_text(json.dumps(params))
    torch.save(weights, folder / "checkpoint.pth")
