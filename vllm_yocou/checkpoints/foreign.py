"""The two other YOCO schemas, in terms of this one: what their keys and tensors are called here.

A key or tensor that this architecture has no place for is refused by name, and so is the lack of a key that changes
what is computed: nothing of a source is ignored or guessed unless its name says that it is metadata.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_yocou.config import FOREIGN_SWITCHES, YocoUConfig

# Of transformers' own config files; they change nothing that is computed.
METADATA = {
    "architectures",
    "auto_map",
    "dtype",
    "initializer_range",
    "model_type",
    "torch_dtype",
    "transformers_version",
}
METADATA |= {"use_cache"}
KEPT = {"bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"}

# Ours by theirs.
AUTHORS_KEYS = {
    "universal_loop": "num_iterations",
    "n_layers": "num_hidden_layers",
    "head": "num_attention_heads",
    "kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "cross_head": "cross_num_attention_heads",
    "cross_kv_head": "cross_num_key_value_heads",
    "cross_head_dim": "cross_head_dim",
    "d_model": "hidden_size",
    "d_ffn": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
    "rope_theta": "rope_theta",
}
AUTHORS_MOE_KEYS = {
    "moe_expert_num": "num_experts",
    "moe_top_k": "num_experts_per_tok",
    "moe_ffn_dim": "moe_intermediate_size",
    "d_shared_expert": "shared_expert_intermediate_size",
}
AUTHORS_OTHER_KEYS = {"yoco_cross_layers", "yoco_window_size", "moe"}
AUTHORS_GLOBAL = {"yoco_norm": "norm", "k_proj": "k_proj", "v_proj": "v_proj"}

YOCO2024_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_self_heads": "num_attention_heads",
    "n_attn_heads": "cross_num_attention_heads",
    "n_attn_kv_heads": "cross_num_key_value_heads",
    "sliding_window": "sliding_window",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
}
# How training ran, in params.json.
YOCO2024_METADATA = {"max_batch_size", "model_parallel_size", "load_checkpoint"}
YOCO2024_LAYER = {
    "mixer_layer_norm": "input_layernorm",
    "final_layer_norm": "post_attention_layernorm",
    "ffn.fc1": "mlp.gate_proj",
    "ffn.gate": "mlp.up_proj",
    "ffn.fc2": "mlp.down_proj",
}
YOCO2024_TOP = {
    "embed_tokens": "model.embed_tokens",
    "cross_decoder.kv_layer_norm": "model.global_kv.norm",
    "cross_decoder.k_proj": "model.global_kv.k_proj",
    "cross_decoder.v_proj": "model.global_kv.v_proj",
    "layer_norm": "model.norm",
    "output_projection": "lm_head",
}


@dataclass(frozen=True)
class Foreign:
    """A source checkpoint as this schema has it.

    Attributes:
        config: of the converted checkpoint; whether embeddings are tied and a shared expert gated, the tensors say.
        rename: the name here of a tensor there, or None for one that has no place.
    """

    config: YocoUConfig
    rename: Callable[[str], str | None]


def recognise(folder: Path, tensors: set[str], tied: bool, context: int | None) -> Foreign:
    """What the checkpoint in `folder` with these tensors is.

    Args:
        tied: whether the head and the embeddings are one tensor.
        context: longest context in tokens, for sources that do not say.

    Raises:
        ValueError: it is of neither schema, or computes something that this architecture does not.
    """
    if (params := folder / "params.json").exists():
        return yoco2024(json_object(params), tied, context)
    if (config := folder / "config.json").exists():
        return authors(json_object(config), tensors, context)
    raise ValueError(f"{folder} has neither params.json nor config.json: give the folder of a checkpoint.")


def authors(keys: dict, tensors: set[str], context: int | None) -> Foreign:
    """`model_type: "yoco"` of the authors' serving fork. FlashAttention's window (w, 0) sees w + 1 keys."""
    if keys.get("model_type") == YocoUConfig.model_type:
        raise ValueError(
            f"the source is of model_type '{YocoUConfig.model_type}' already: there is nothing to convert."
        )
    if keys.get("model_type") != "yoco" or "yoco_window_size" not in keys:
        raise ValueError(
            f"the source is of model_type '{keys.get('model_type')}' without the authors' keys: convert reads their "
            "'yoco' (with yoco_window_size) and the 2024 code's params.json."
        )
    moe = bool(keys.get("moe"))
    names = AUTHORS_KEYS | (AUTHORS_MOE_KEYS if moe else {})
    ours = _translated(keys, names, context, required=("universal_loop", "norm_eps", "rope_theta"))
    if not ours.get("shared_expert_intermediate_size"):
        ours.pop("shared_expert_intermediate_size", None)
    if moe:
        # Every layer is a mixture: the dense width is not used, and the authors may leave it out.
        ours.setdefault("intermediate_size", ours.get("moe_intermediate_size"))
    cross_layers = _number(keys, "yoco_cross_layers")
    self_layers = _number(keys, "n_layers") - cross_layers
    config = YocoUConfig(
        **ours,
        num_self_decoder_layers=self_layers,
        sliding_window=_number(keys, "yoco_window_size") + 1,
        shared_expert_gate=any(name.endswith("shared_expert_gate.weight") for name in tensors),
    )
    _refuse_unknown(keys, {*AUTHORS_KEYS, *AUTHORS_MOE_KEYS, *AUTHORS_OTHER_KEYS}, config)

    def rename(name: str) -> str | None:
        if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name):
            i, rest = int(layer[1]), layer[2]
            if i < self_layers:
                return f"model.self_decoder.layers.{i}.{rest}"
            return f"model.cross_decoder.layers.{i - self_layers}.{rest.replace('self_attn.', 'cross_attn.')}"
        if part := re.fullmatch(r"model\.(\w+)\.weight", name):
            return f"model.global_kv.{AUTHORS_GLOBAL[part[1]]}.weight" if part[1] in AUTHORS_GLOBAL else name
        return name if name == "lm_head.weight" else None

    return Foreign(config, rename)


def yoco2024(keys: dict, tied: bool, context: int | None) -> Foreign:
    """The 2024 YOCO code (arXiv 2405.05254): one iteration, interleaved RoPE of its own in both decoders."""
    if not keys.get("sliding_window"):
        raise ValueError(
            "params.json has no sliding_window: its self-decoder is gated retention, which this architecture does not "
            "have, convert a checkpoint with sliding-window layers."
        )
    ours = _translated(keys, YOCO2024_KEYS, context, required=("norm_eps", "rope_theta"))
    hidden, heads, cross_heads = (_number(keys, key) for key in ("dim", "n_self_heads", "n_attn_heads"))
    for key, count in (("n_self_heads", heads), ("n_attn_heads", cross_heads)):
        if hidden % count:
            raise ValueError(f"dim {hidden} is not divisible by {key} {count}: correct params.json.")
    config = YocoUConfig(
        **ours,
        num_iterations=1,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        cross_head_dim=hidden // cross_heads,
        embedding_multiplier=hidden**0.5,
        rope_interleaved=True,
        cross_decoder_rope=True,
        rope_parameters={"rope_type": "yoco2024", "rope_theta": keys["rope_theta"]},
        tie_word_embeddings=tied,
    )
    _refuse_unknown(keys, {*YOCO2024_KEYS, "rope_theta", *YOCO2024_METADATA}, config)

    def rename(name: str) -> str | None:
        module, _, kind = name.rpartition(".")
        if kind != "weight":
            return None
        if module in YOCO2024_TOP:
            return f"{YOCO2024_TOP[module]}.weight"
        layer = re.fullmatch(r"(self|cross)_decoder\.layers\.(\d+)\.(.+)", module)
        if layer is None:
            return None
        decoder, i, part = layer.groups()
        if projection := re.fullmatch(r"mixer\.(q|k|v|out)_proj", part):
            part = f"{decoder}_attn.{'o' if projection[1] == 'out' else projection[1]}_proj"
        elif part in YOCO2024_LAYER:
            part = YOCO2024_LAYER[part]
        else:
            return None
        return f"model.{decoder}_decoder.layers.{i}.{part}.weight"

    return Foreign(config, rename)


def json_object(path: Path) -> dict:
    """The keys of a source's config file."""
    try:
        keys = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is not JSON ({error}): copy it again.") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{path} is not a JSON object: give a folder with the source's own {path.name}.")
    return keys


def _translated(keys: dict, names: dict[str, str], context: int | None, required: tuple[str, ...]) -> dict:
    """Keys of ours for those of `keys` that have a value."""
    for key in required:
        if keys.get(key) is None:
            raise ValueError(f"the source's '{key}' is missing, and a guess could change what is computed: add it.")
    ours = {names.get(key, key): value for key, value in keys.items() if key in names or key in KEPT}
    ours = {key: value for key, value in ours.items() if value is not None}
    length = context or ours.get("max_position_embeddings")
    if length is None or length == -1:
        raise ValueError("the source does not say how long its context is (max_seq_len): give --context.")
    return ours | {"max_position_embeddings": length}


def _refuse_unknown(keys: dict, known: set[str], config: YocoUConfig) -> None:
    """Keys without a place here, unless they say under a name of ours what the converted config says."""
    switches = [key for key in FOREIGN_SWITCHES if keys.get(key)]
    if switches:
        raise ValueError(
            f"the source's '{switches[0]}' is {keys[switches[0]]!r}: YOCO-U as served here computes nothing of that "
            "kind, convert a checkpoint trained without it."
        )
    known = known | METADATA | KEPT | set(FOREIGN_SWITCHES)
    unknown = [key for key, value in keys.items() if key not in known and value is not None]
    unknown = [key for key in unknown if getattr(config, key, None) != keys[key]]
    if unknown:
        listed = ", ".join(f"'{key}' ({keys[key]!r})" for key in unknown)
        raise ValueError(
            f"the source has {listed}, and what that changes is not known here: remove what does not change the "
            "computation."
        )


def _number(keys: dict, key: str) -> int:
    value = keys.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"the source's '{key}' is {value!r}: it must be a whole number of at least 1.")
    return value
