"""Checkpoints of the 2024 YOCO code (arXiv 2405.05254): one iteration, interleaved RoPE of its own in both decoders."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from vllm_yocou.checkpoints.mapping import Mapping, Source, by_name
from vllm_yocou.checkpoints.tensors import SourceTensor
from vllm_yocou.checkpoints.translation import refuse_unknown, translated, whole_number
from vllm_yocou.config import YocoUConfig

# Ours by theirs.
KEYS = {
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
METADATA = {"max_batch_size", "model_parallel_size", "load_checkpoint"}
LAYER = {
    "mixer_layer_norm": "input_layernorm",
    "final_layer_norm": "post_attention_layernorm",
    "ffn.fc1": "mlp.gate_proj",
    "ffn.gate": "mlp.up_proj",
    "ffn.fc2": "mlp.down_proj",
}
TOP = {
    "embed_tokens": "model.embed_tokens",
    "cross_decoder.kv_layer_norm": "model.global_kv.norm",
    "cross_decoder.k_proj": "model.global_kv.k_proj",
    "cross_decoder.v_proj": "model.global_kv.v_proj",
    "layer_norm": "model.norm",
    "output_projection": "lm_head",
}


def recognise(folder: Path, keys: dict[str, Any], context: int | None) -> Source:
    """The checkpoint in `folder`: no other schema has a params.json, which `keys` are from.

    Args:
        context: longest context in tokens, for sources that do not say.
    """
    return Source(folder, partial(mapping, keys=keys, context=context))


def mapping(tensors: dict[str, SourceTensor], keys: dict[str, Any], context: int | None) -> Mapping:
    """What becomes of the tensors.

    Raises:
        ValueError: the source computes something that this architecture does not, or lacks a key.
    """
    return by_name(tensors, _config(keys, context, _tied(tensors)), _rename)


def _tied(tensors: dict[str, SourceTensor]) -> bool:
    """Whether the state dict has one tensor for the embeddings and the head, under both names."""
    embeddings, head = (tensors.get(name) for name in ("embed_tokens.weight", "output_projection.weight"))
    if embeddings is None or head is None:
        return False
    return embeddings.read().data_ptr() == head.read().data_ptr()


def _config(keys: dict[str, Any], context: int | None, tied: bool) -> YocoUConfig:
    if not keys.get("sliding_window"):
        raise ValueError(
            "params.json has no sliding_window: its self-decoder is gated retention, which this architecture does not "
            "have, convert a checkpoint with sliding-window layers."
        )
    ours = translated(keys, KEYS, context, required=("norm_eps", "rope_theta"))
    hidden, heads, cross_heads = (whole_number(keys, key) for key in ("dim", "n_self_heads", "n_attn_heads"))
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
    refuse_unknown(keys, {*KEYS, "rope_theta", *METADATA}, config)
    return config


def _rename(name: str) -> str | None:
    module, _, kind = name.rpartition(".")
    if kind != "weight":
        return None
    if module in TOP:
        return f"{TOP[module]}.weight"
    layer = re.fullmatch(r"(self|cross)_decoder\.layers\.(\d+)\.(.+)", module)
    if layer is None:
        return None
    decoder, i, part = layer.groups()
    if projection := re.fullmatch(r"mixer\.(q|k|v|out)_proj", part):
        part = f"{decoder}_attn.{'o' if projection[1] == 'out' else projection[1]}_proj"
    elif part in LAYER:
        part = LAYER[part]
    else:
        return None
    return f"model.{decoder}_decoder.layers.{i}.{part}.weight"
