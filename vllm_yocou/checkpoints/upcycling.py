"""A YOCO-U model out of a Llama: which of its layers becomes what.

Every tensor of the new model is one of the source's. A self layer takes a whole source layer; a cross layer takes the
queries and the output of one layer's attention and the feed-forward of one; the global K and V are those of one. By
default the first S layers become the self-decoder, and all cross layers attend as the first layer behind those does,
whose keys and values they read. So with T = 1, RoPE in the cross-decoder and a window that no prompt exceeds, the new
model computes what the source computes up to and including that layer. What is behind it reads keys and values of
another layer, and every further iteration reads its own output: training has to heal that.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from vllm_yocou.checkpoints.converter import Plan, assemble, read_tensors, redundant
from vllm_yocou.checkpoints.foreign import json_object
from vllm_yocou.checkpoints.format import expected_shapes
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


def choose(
    source_layers: int,
    self_layers: int | None = None,
    self_from: Sequence[int] | None = None,
    global_from: int | None = None,
    attention_from: Sequence[int] | None = None,
    cross_from: Sequence[int] | None = None,
) -> Layers:
    """The layers that were asked for; the rest as benchmarks/upcycling.py found it best.

    By default the first S layers become the self-decoder, all behind them the cross-decoder, and every cross layer
    attends as the layer does whose keys and values it reads: the first of them.

    Raises:
        ValueError: a layer that the source does not have, or lists that do not go together.
    """
    if self_layers is None:
        self_layers = source_layers // 2 if self_from is None else len(self_from)
    if self_from is None:
        self_from = range(self_layers)
    if len(self_from) != self_layers:
        raise ValueError(
            f"--self-from names {len(self_from)} layers and --self-layers says {self_layers}: give one of them."
        )
    if cross_from is None:
        cross_from = range(max(self_from, default=-1) + 1, source_layers)
    if not self_from or not cross_from:
        raise ValueError(
            f"{len(self_from)} layers for the self-decoder leave {len(cross_from)} of {source_layers} for the "
            "cross-decoder: both need one, choose --self-layers between 1 and "
            f"{source_layers - 1} or name the layers."
        )
    if global_from is None:
        global_from = cross_from[0]
    if attention_from is None:
        attention_from = [global_from] * len(cross_from)
    if len(attention_from) != len(cross_from):
        raise ValueError(
            f"--attention-from names {len(attention_from)} layers for {len(cross_from)} cross layers: name one for "
            "each."
        )
    layers = Layers(self_from, global_from, attention_from, cross_from)
    for name, *chosen in layers.rows():
        for layer in filter(None, chosen):
            if layer >= source_layers:
                raise ValueError(
                    f"{name} is to come from layer {layer}: the source has layers 0 to {source_layers - 1}, choose "
                    "one of them."
                )
    return layers


def llama_config(source: Path) -> LlamaConfig:
    """The config of the Llama in the folder `source`.

    Raises:
        ValueError: it is something else, or computes what YOCO-U does not.
    """
    if not (source / "config.json").exists():
        raise ValueError(f"{source} has no config.json: give the folder of a Llama in Hugging Face's format.")
    keys = json_object(source / "config.json")
    if keys.get("model_type") != "llama":
        raise ValueError(f"the source is of model_type '{keys.get('model_type')}': upcycle makes YOCO-U from 'llama'.")
    if keys.get("quantization_config"):
        raise ValueError("the source's 'quantization_config' says that it is quantized: upcycle the weights before.")
    llama = LlamaConfig.from_dict(keys)
    for key, plain in PLAIN.items():
        if (value := getattr(llama, key)) not in (plain, None):
            raise ValueError(
                f"the source's '{key}' is {value!r}: YOCO-U computes nothing of that kind, upcycle a Llama with "
                f"{plain!r}."
            )
    return llama


def plan(
    source: Path,
    destination: Path,
    *,
    iterations: int,
    window: int,
    cross_rope: bool,
    dtype: str | None = None,
    **chosen,
) -> tuple[Plan, Layers]:
    """Find out how the Llama in the folder `source` becomes a YOCO-U model in the folder `destination`.

    Args:
        iterations, window: T and W of the new model.
        cross_rope: whether the cross-decoder's queries and the global keys are rotated, as the source's were.
        dtype: of all tensors, by default each one's own.
        chosen: as `choose` takes them.

    Raises:
        ValueError: the source is no Llama, or one with parts that YOCO-U lacks; layers that it does not have; or
            `destination` is there already.
    """
    llama = llama_config(source)
    layers = choose(llama.num_hidden_layers, **chosen)
    config = YocoUConfig(
        **{key: getattr(llama, key) for key in SHARED_KEYS},
        rope_parameters={key: value for key, value in llama.rope_parameters.items() if value is not None},
        num_hidden_layers=len(layers.self_from) + len(layers.cross_from),
        num_self_decoder_layers=len(layers.self_from),
        num_iterations=iterations,
        sliding_window=window,
        cross_decoder_rope=cross_rope,
    )
    tensors = read_tensors(source)
    origins = {target: layers.origin(target) for target in expected_shapes(config)}
    left_out, unexpected = {}, []
    used = set(origins.values())
    for name in (name for name in tensors if name not in used):
        reason = redundant(name, tensors[name], config, is_head=name == "lm_head.weight") or _not_chosen(name, llama)
        if reason:
            left_out[name] = reason
        else:
            unexpected.append(name)
    return assemble(source, destination, config, tensors, origins, left_out, unexpected, dtype), layers


def _not_chosen(name: str, llama: LlamaConfig) -> str | None:
    """Why a tensor of a layer of this Llama has no place; None for one that is no Llama's."""
    norms, matrices = r"(?:input|post_attention)_layernorm", r"self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj"
    found = re.fullmatch(rf"model\.layers\.(\d+)\.(?:{norms}|{matrices})\.weight", name)
    if found is None or int(found[1]) >= llama.num_hidden_layers:
        return None
    return "not asked for"
