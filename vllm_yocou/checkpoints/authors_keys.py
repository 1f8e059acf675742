"""The authors' config keys in terms of ours: read as their code reads them, defaults and precedence included.

A key that nothing here reads ends the conversion, and so does a value that asks for what this architecture does not
compute. So no switch is ignored. Where their code falls back on a default that changes what is computed, or their codes
differ, the user gets a note.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_yocou.checkpoints.mapping import Origin
from vllm_yocou.checkpoints.translation import KEPT, context_length, refuse_unknown
from vllm_yocou.config import YocoUConfig
from vllm_yocou.config_keys import is_number, is_whole

# They repeat another key, describe the training, or set up a quantization that another key turns on.
UNREAD = {
    "moe",
    "mtp_n",
    "unk_token_id",
    "act_quant_method",
    "moe_intermediate_act_quant_method",
    "weight_quant_method",
    "weight_clip_val_init_method",
    "quant_block_size",
    "int8_embedding_block_size",
    "int8_lm_head_block_size",
}
# Keys that turn on a quantization of theirs, and the values with which they do not.
QUANTIZATION = (
    "quant_mode",
    "bit_linear",
    "attn_bit_linear_level",
    "ffn_bit_linear_level",
    "moe_expert_bit_linear",
    "moe_expert_quant_dtp",
    "int8_embedding",
    "int8_lm_head",
)
UNQUANTIZED = ("", "off", "none", "bfloat16", 0)
# Of a model that is not converted, why.
EMBEDDING_PROJECTION = "the embeddings are projected to the hidden size and back, which YOCO-U does not compute"
BITNET = "it quantizes activations and weights in training, which YOCO-U does not compute"
VISION = "the model reads images, and only language models are converted"
DIFFERENTIAL = ("diff_v3", "diff_v2", "diff_attention")


@dataclass(frozen=True)
class Reading:
    """What the keys say.

    Attributes:
        config: of the YOCO-U checkpoint.
        weighted_norms: whether the norms of queries and keys have weights of their own, or else ones.
        normalised_router: whether the router's rows are stored divided by their lengths.
        gates_by_half: whether differential attention's gates are stored first for all first heads, then for all second.
        notes: sentences for the user.
    """

    config: YocoUConfig
    weighted_norms: bool
    normalised_router: bool
    gates_by_half: bool
    notes: list[str]


class Keys:
    """The keys of one config, and which of them were read.

    Keys under several spellings are given in the order in which the authors' code prefers them; null counts as absent.
    """

    def __init__(self, given: Mapping[str, Any]):
        self.given = given
        self.read: set[str] = set()
        self.notes: list[str] = []

    def value(self, *spellings: str, assumed: Any = None) -> Any:
        """Of the first spelling that has one; or else `assumed`, which their code takes, with a note unless None."""
        self.read.update(spellings)
        found = {key: self.given[key] for key in spellings if self.given.get(key) is not None}
        if not found:
            if assumed is not None:
                self.notes.append(
                    f"the source does not give '{spellings[0]}': {assumed!r} is used, as in the authors' code."
                )
            return assumed
        (first, value), *others = found.items()
        for key, other in others:
            if other != value:
                self.notes.append(
                    f"the source's '{first}' is {value!r} and its '{key}' is {other!r}: the first is used, as in the "
                    "authors' code."
                )
        return value

    def required(self, *spellings: str) -> Any:
        value = self.value(*spellings)
        if value is None:
            named = " or ".join(f"'{key}'" for key in spellings)
            raise ValueError(f"the source's {named} is missing: no model can be built without it, add it.")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.value(key)
        if not (value is None or isinstance(value, bool)):
            raise ValueError(f"the source's '{key}' is {value!r}: it must be true or false.")
        return value

    def number(self, key: str, assumed: float) -> float:
        value = self.value(key, assumed=assumed)
        if not is_number(value):
            raise ValueError(f"the source's '{key}' is {value!r}: it must be a number.")
        return value

    def count(self, *spellings: str, assumed: int | None = None, least: int = 0) -> int:
        """A whole number of at least `least`; one that is absent and not `assumed` counts as 0."""
        value = self.value(*spellings, assumed=assumed)
        value = 0 if value is None else value
        if not is_whole(value) or value < least:
            first = next((key for key in spellings if self.given.get(key) is not None), spellings[0])
            raise ValueError(
                f"the source's '{first}' is {self.given.get(first)!r}: it must be a whole number of at least {least}."
            )
        return value

    def refuse(self, key: str, reason: str, remedy: str) -> None:
        raise ValueError(f"the source's '{key}' is {self.given.get(key)!r}: {reason}, {remedy}.")


def read_keys(given: Mapping[str, Any], found: dict[str, Origin], context: int | None, of_trainer: bool) -> Reading:
    """What a config of theirs says about the tensors that were `found`, by their served names.

    Args:
        context: longest context in tokens, for sources that do not say.
        of_trainer: whether the keys are the trainer's, whose weights hold what an exported folder lacks.

    Raises:
        ValueError: a key asks for what this architecture does not compute, is unknown, or lacks a value.
    """
    keys = Keys(given)
    hidden = keys.required("hidden_size", "d_model")
    _refuse_dialects(keys, hidden)
    kind, by_half = _differential(keys, of_trainer)
    norms, weighted = _query_norms(keys)
    limit = keys.number("swiglu_limit", assumed=10.0)
    scale = keys.value("logit_scale")
    config = YocoUConfig(
        **{key: given[key] for key in KEPT if given.get(key) is not None},
        **_layers(keys),
        **_heads(keys),
        **norms,
        **_attention(keys, kind, of_trainer),
        **_experts(keys),
        hidden_size=hidden,
        max_position_embeddings=context_length(keys.value("max_position_embeddings", "max_seq_len"), context),
        rope_parameters={"rope_type": "default", "rope_theta": keys.value("rope_theta", assumed=10000.0)},
        rms_norm_eps=keys.value("rms_norm_eps", "norm_eps", assumed=1e-6),
        swiglu_limit=None if limit <= 0 else limit,
        logit_scale=1.0 if scale is None else scale,
        residual_in_fp32=True,
        tie_word_embeddings=_tied(keys, found, of_trainer),
    )
    if config.cross_head_dim != config.head_dim:
        keys.refuse(
            "cross_head_dim",
            f"the authors' code takes head_dim, {config.head_dim}, in both decoders",
            "convert a checkpoint in which they are equal",
        )
    normalised = bool(keys.flag("router_weights_normalized"))
    refuse_unknown(dict(given), keys.read | UNREAD, config)
    if not given.get("diff_v3") and all(given.get(key) is None for key in ("diff_v2", "diff_attention")):
        _refuse_undeclared(config, found)
    return Reading(config, weighted, normalised, by_half, keys.notes)


def _layers(keys: Keys) -> dict[str, Any]:
    """Layers of both decoders, loops and the window."""
    layers = keys.count("num_hidden_layers", "n_layers", least=1)
    cross_layers = keys.count("yoco_cross_layers")
    if not cross_layers:
        keys.refuse(
            "yoco_cross_layers",
            "without a cross-decoder there are no global keys and values",
            "convert a checkpoint that has one",
        )
    window = keys.count("sliding_window_size", "yoco_window_size", assumed=512, least=1)
    return dict(
        num_hidden_layers=layers,
        num_self_decoder_layers=layers - cross_layers,
        num_iterations=keys.value("universal_loop", assumed=1),
        sliding_window=window + 1,  # FlashAttention's window (w, 0) sees w + 1 keys
    )


def _refuse_dialects(keys: Keys, hidden: Any) -> None:
    """Raise ValueError for keys of models that are not converted."""
    for key in QUANTIZATION:
        if (value := keys.value(key)) is not None and value not in UNQUANTIZED:
            keys.refuse(key, BITNET, "convert a checkpoint trained without it")
    for key in ("embproj", "emb_proj_norm"):
        if keys.flag(key):
            keys.refuse(key, EMBEDDING_PROJECTION, "convert a checkpoint trained without it")
    if keys.value("embedding_dim") not in (None, 0, hidden):
        keys.refuse("embedding_dim", EMBEDDING_PROJECTION, "convert a checkpoint trained without it")
    if keys.flag("gated_attention"):
        keys.refuse(
            "gated_attention",
            "it is not known whether its gates are one a head or one a channel",
            "convert a checkpoint trained without it",
        )


def _heads(keys: Keys) -> dict[str, Any]:
    """Head counts and widths of both decoders."""
    heads = keys.required("num_attention_heads", "head")
    kv_heads = keys.required("num_key_value_heads", "kv_head")
    cross_heads = keys.value("cross_head")
    if cross_heads is None:  # their code then prefers the other spelling than in the self-decoder
        cross_heads = keys.given.get("head") or heads
    return dict(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=keys.value("head_dim"),
        cross_num_attention_heads=cross_heads,
        cross_num_key_value_heads=keys.value("cross_kv_head") or kv_heads,
        cross_head_dim=keys.value("cross_head_dim"),
    )


def _differential(keys: Keys, of_trainer: bool) -> tuple[str, bool]:
    """The kind of differential attention, and whether its gates are stored by half."""
    v3, v2, either = (keys.flag(key) for key in DIFFERENTIAL)
    by_half = bool(keys.flag("diff_both_lamb"))
    if by_half and not (of_trainer and either and v3 is None and v2 is None):
        keys.refuse(
            "diff_both_lamb",
            "the order of its gates is known only for a trainer's checkpoint with diff_attention and neither diff_v2 "
            "nor diff_v3",
            "set the keys to what it was trained with",
        )
    if v3 or by_half:
        return "v3", by_half
    if v2 is None and either is None:
        keys.notes.append(
            "the source does not say by 'diff_v3', 'diff_v2' or 'diff_attention' which attention it has: differential "
            "attention (v2) is used, as in the authors' code."
        )
        return "v2", False
    return ("v2" if (either if v2 is None else v2) else "none"), False


def _query_norms(keys: Keys) -> tuple[dict[str, Any], bool]:
    """The norms of queries and keys, and whether they have weights."""
    clip, norm, weighted = (bool(keys.flag(key)) for key in ("qk_rms_clip", "qk_norm", "qk_rms_gamma"))
    self_only, limit = keys.flag("qk_norm_self_only"), keys.value("qk_rms_limit")
    if clip:
        return dict(qk_norm="all", qk_clip_limit=3.0 if limit is None else limit), weighted
    if not norm:
        return dict(qk_norm="none"), weighted
    if self_only is None:
        keys.notes.append(
            "the source gives 'qk_norm' without 'qk_norm_self_only': both decoders are normed, as in the authors' "
            "serving code, but their stand-alone code norms the self-decoder only. Compare some log probabilities with "
            "those of the training."
        )
    return dict(qk_norm="self" if self_only else "all"), weighted


def _attention(keys: Keys, kind: str, of_trainer: bool) -> dict[str, Any]:
    """Differential attention; and biases and gates of heads, which exported folders have lost."""
    bias, gates = bool(keys.flag("attention_bias")), bool(keys.flag("headwise_glu"))
    for key, present in (("attention_bias", bias), ("headwise_glu", gates)):
        if present and not of_trainer:
            keys.refuse(
                key,
                "the authors' serving code has no place for these tensors and leaves them out in silence, so an "
                "exported folder does not say what was trained",
                "convert the trainer's state dict with its metadata.json",
            )
    if gates and kind != "none":
        keys.refuse(
            "headwise_glu",
            f"differential attention ({kind}) has gates in its place",
            "set the keys to what it was trained with",
        )
    return dict(attention_bias=bias, headwise_glu=gates, differential_attention=kind)


def _experts(keys: Keys) -> dict[str, Any]:
    """The mixture of experts and the width of dense layers."""
    width = keys.value("intermediate_size", "d_ffn")
    experts = keys.count("num_experts", "moe_expert_num")
    chosen = keys.value("num_experts_per_tok", "moe_top_k", "top_k")
    expert_width = keys.value("moe_intermediate_size", "moe_ffn_dim")
    latent = keys.count("moe_latent_dim")
    latent_norm = bool(keys.flag("moe_latent_norm"))
    dense_layers = keys.count("dense_layers")
    shared = ("shared_expert_intermediate_size", "d_shared_expert")
    if not experts:
        keys.value(*shared)
        return dict(intermediate_size=width)
    shared_width = keys.required(*shared)
    if width is None and not dense_layers:  # no layer has this width, and the config may leave it out
        width = expert_width
    return dict(
        intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=expert_width,
        shared_expert_intermediate_size=shared_width or None,
        shared_expert_gate=bool(shared_width),
        moe_latent_size=latent or None,
        moe_latent_norm=bool(latent and latent_norm),
        first_k_dense_replace=dense_layers,
        router_in_fp32=True,
    )


def _tied(keys: Keys, found: dict[str, Origin], of_trainer: bool) -> bool:
    """Whether the head is the embeddings. Their serving code does not read the trainer's `weight_tying`.

    So an exported folder with a head and `weight_tying` alone is served with its head.
    """
    tied, trained_tied = keys.flag("tie_word_embeddings"), keys.flag("weight_tying")
    if tied is not None:
        return tied
    return bool(trained_tied) and (of_trainer or "lm_head.weight" not in found)


def _refuse_undeclared(config: YocoUConfig, found: dict[str, Origin]) -> None:
    """Raise ValueError unless the shapes are those of differential attention (v2), if no key says what it is."""
    heads, queries = config.num_attention_heads, config.num_query_heads * config.head_dim
    prefix = "model.layers.0.self_attn"
    for name, rows in ((f"{prefix}.q_proj.weight", queries), (f"{prefix}.lambda_proj.weight", heads)):
        origin = found.get(name)
        stored = origin.tensor.shape[0] if origin and origin.tensor and origin.tensor.shape else 0
        if stored != rows:
            raise ValueError(
                "the source does not say by 'diff_v3', 'diff_v2' or 'diff_attention' which attention it has, which "
                f"means differential attention (v2) to the authors' code, and {name} has {stored} rows instead of "
                f"{rows}: set 'diff_v2' and 'diff_v3' to what it was trained with."
            )
