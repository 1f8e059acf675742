"""A YOCO-U model out of a Llama: which of its layers becomes what.

Every tensor of the new model is one of the source's, unless calibration.py refits it. A self layer takes a whole source
layer; a cross layer takes the queries and the output of one layer's attention and the feed-forward of one; the global K
and V are those of one. By default the first S layers become the self-decoder, and all cross layers attend as the first
layer after those does, whose keys and values they read. So with T = 1, RoPE in the cross-decoder and a window that no
prompt exceeds, the new model computes what the source computes up to and including that layer. The layers after it read
keys and values of another layer, and every further iteration reads its own output: training has to heal that.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from vllm_yocou.checkpoints.format import expected_shapes
from vllm_yocou.checkpoints.mapping import Mapping, Origin, Source, redundant
from vllm_yocou.checkpoints.tensors import SourceTensor
from vllm_yocou.config import YocoUConfig

# Values of a Llama's config with which it computes what a YOCO-U layer can.
PLAIN = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
# Of LlamaConfig and YocoUConfig alike.
SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True)
class Upcycling:
    """What a user may ask for; layers are numbers of source layers, counted from 0.

    Attributes:
        iterations, window: T and W of the new model.
        cross_rope: whether the cross-decoder's queries and the global keys are rotated, as the source's were.
        global_kv_heads: heads of the global keys and values, by default the source's; more repeat these.
        self_layers: S, by default as many as `self_from` names, or else half of the source's.
        self_from, global_from, attention_from, cross_from: as in `Layers`, by default what `choose` says.
    """

    iterations: int
    window: int
    cross_rope: bool = True
    global_kv_heads: int | None = None
    self_layers: int | None = None
    self_from: Sequence[int] | None = None
    global_from: int | None = None
    attention_from: Sequence[int] | None = None
    cross_from: Sequence[int] | None = None


@dataclass(frozen=True)
class Layers:
    """Where each layer comes from, as numbers of source layers counted from 0.

    Attributes:
        self_from: of the self layers, all that is in them.
        global_from: of the global K and V with the norm before them.
        attention_from: of the cross layers' queries and output, with the norm before them.
        cross_from: of the rest of the cross layers, the feed-forward with its norm.
    """

    self_from: Sequence[int]
    global_from: int
    attention_from: Sequence[int]
    cross_from: Sequence[int]

    def origin(self, target: str) -> str:
        """The source's name for the tensor that the YOCO-U checkpoint calls `target`."""
        if found := re.fullmatch(r"model\.(self|cross)_decoder\.layers\.(\d+)\.(.+)", target):
            attends = found[3].startswith(("cross_attn.", "input_layernorm."))
            cross_from = self.attention_from if attends else self.cross_from
            chosen = self.self_from if found[1] == "self" else cross_from
            return f"model.layers.{chosen[int(found[2])]}.{found[3].replace('cross_attn.', 'self_attn.')}"
        if found := re.fullmatch(r"model\.global_kv\.(.+)", target):
            part = "input_layernorm.weight" if found[1] == "norm.weight" else f"self_attn.{found[1]}"
            return f"model.layers.{self.global_from}.{part}"
        return target

    def rows(self) -> list[tuple[str, int, int | None]]:
        """(layer here, source of its attention, source of its feed-forward), in the order of computation."""
        return [
            *((f"self layer {i}", layer, layer) for i, layer in enumerate(self.self_from)),
            ("global K and V", self.global_from, None),
            *(
                (f"cross layer {j}", *pair)
                for j, pair in enumerate(zip(self.attention_from, self.cross_from, strict=True))
            ),
        ]


def choose(source_layers: int, asked: Upcycling) -> Layers:
    """The layers that were asked for; the rest as benchmarks/upcycling.py found it best.

    By default the first S layers become the self-decoder, all after them the cross-decoder, and every cross layer
    attends as the layer does whose keys and values it reads: the first of them.

    Raises:
        ValueError: a layer that the source does not have, or lists that do not go together.
    """
    self_from = _self_from(source_layers, asked)
    cross_from = asked.cross_from
    if cross_from is None:
        cross_from = range(max(self_from, default=-1) + 1, source_layers)
    if not self_from or not cross_from:
        raise ValueError(
            f"{len(self_from)} layers for the self-decoder leave {len(cross_from)} of {source_layers} for the "
            "cross-decoder: both need one, choose --self-layers between 1 and "
            f"{source_layers - 1} or name the layers."
        )
    global_from = cross_from[0] if asked.global_from is None else asked.global_from
    attention_from = asked.attention_from
    if attention_from is None:
        attention_from = [global_from] * len(cross_from)
    if len(attention_from) != len(cross_from):
        raise ValueError(
            f"--attention-from names {len(attention_from)} layers for {len(cross_from)} cross layers: name one for "
            "each."
        )
    layers = Layers(self_from, global_from, attention_from, cross_from)
    for name, *chosen in layers.rows():
        for layer in chosen:
            if layer is not None and layer >= source_layers:
                raise ValueError(
                    f"{name} is to come from layer {layer}: the source has layers 0 to {source_layers - 1}, choose "
                    "one of them."
                )
    return layers


def _self_from(source_layers: int, asked: Upcycling) -> Sequence[int]:
    if asked.self_from is None:
        return range(source_layers // 2 if asked.self_layers is None else asked.self_layers)
    if asked.self_layers not in (None, len(asked.self_from)):
        raise ValueError(
            f"--self-from names {len(asked.self_from)} layers and --self-layers says {asked.self_layers}: give one of "
            "them."
        )
    return asked.self_from


def recognise(folder: Path, keys: dict[str, Any], asked: Upcycling) -> Source | None:
    """The Llama in `folder`; None if the `keys` of its config.json are another model's.

    Raises:
        ValueError: it computes what YOCO-U does not, or does not have the layers that were asked for.
    """
    if keys.get("model_type") != LlamaConfig.model_type:
        return None
    if keys.get("quantization_config"):
        raise ValueError("the source's 'quantization_config' says that it is quantized: upcycle the weights before.")
    llama = LlamaConfig.from_dict(keys)
    for key, plain in PLAIN.items():
        if (value := getattr(llama, key)) not in (plain, None):
            raise ValueError(
                f"the source's '{key}' is {value!r}: YOCO-U computes nothing of that kind, upcycle a Llama with "
                f"{plain!r}."
            )
    layers = choose(llama.num_hidden_layers, asked)
    heads = llama.num_attention_heads
    kv_heads = llama.num_key_value_heads or heads
    global_kv_heads = asked.global_kv_heads or kv_heads
    if global_kv_heads % kv_heads or heads % global_kv_heads:
        raise ValueError(
            f"--global-kv-heads is {global_kv_heads}: each of the source's {kv_heads} is repeated and all share its "
            f"{heads} query heads evenly, choose a multiple of {kv_heads} that divides {heads}."
        )
    config = YocoUConfig(
        **{key: getattr(llama, key) for key in SHARED_KEYS},
        rope_parameters={key: value for key, value in (llama.rope_parameters or {}).items() if value is not None},
        num_hidden_layers=len(layers.self_from) + len(layers.cross_from),
        num_self_decoder_layers=len(layers.self_from),
        num_iterations=asked.iterations,
        sliding_window=asked.window,
        cross_decoder_rope=asked.cross_rope,
        cross_num_key_value_heads=global_kv_heads,
    )
    return Source(
        folder,
        partial(mapping, config=config, layers=layers, source_layers=llama.num_hidden_layers),
        layers.rows(),
    )


def mapping(tensors: dict[str, SourceTensor], config: YocoUConfig, layers: Layers, source_layers: int) -> Mapping:
    """What becomes of the tensors: those of chosen layers are used, once or more, and the others are left out."""
    names = {target: layers.origin(target) for target in expected_shapes(config)}
    found = Mapping(config, {target: Origin(name, tensors.get(name)) for target, name in names.items()}, {}, [])
    times = config.cross_num_key_value_heads // config.num_key_value_heads
    if times > 1:
        for projection in ("k_proj", "v_proj"):
            target = f"model.global_kv.{projection}.weight"
            origin = found.origins[target]
            if origin.tensor is not None:
                repeated = _repeated(origin.tensor, config.head_dim, times)
                found.origins[target] = Origin(origin.name, repeated, f"each head {times} times")
    used = set(names.values())
    for name in (name for name in tensors if name not in used):
        reason = redundant(name, tensors[name], config, is_head=name == "lm_head.weight")
        if reason := reason or _not_chosen(name, source_layers):
            found.left_out[name] = reason
        else:
            found.unexpected.append(name)
    return found


def _repeated(tensor: SourceTensor, head_dim: int, times: int) -> SourceTensor:
    """A projection (K · d, D) with each head `times` times, one after the other: query heads keep the head they had."""

    def change(weight_XD: torch.Tensor) -> torch.Tensor:
        return weight_XD.unflatten(0, (-1, head_dim)).repeat_interleave(times, dim=0).flatten(0, 1)

    rows, *columns = tensor.shape
    return tensor.changed(change, tensor.dtype, (rows * times, *columns))


def _not_chosen(name: str, source_layers: int) -> str | None:
    """Why a tensor of one of the source's layers has no place; None for a tensor that is not a Llama's."""
    norms, matrices = r"(?:input|post_attention)_layernorm", r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj"
    found = re.fullmatch(rf"model\.layers\.(\d+)\.(?:{norms}|{matrices})\.weight", name)
    if found is None or int(found[1]) >= source_layers:
        return None
    return "not asked for"
