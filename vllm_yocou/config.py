"""Every YocoUConfig that exists describes a model that can be built: an impossible value is refused when it is set.

The keys, their defaults and their meaning are the checkpoint format of YOCO-U (arXiv 2604.01220): S self-decoder
layers with a sliding window of W tokens run T times with the same weights, then C cross-decoder layers read one global
KV cache. The checks run on construction, on loading and on every override (`from_pretrained(..., num_iterations=2)`,
vLLM's `--hf-overrides`), and each refusal is a ValueError that names the key, its value and the remedy.
"""

import json
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
POSITIVE_INTEGERS = REQUIRED + (
    "num_self_decoder_layers",
    "num_iterations",
    "sliding_window",
    "num_key_value_heads",
    "head_dim",
    "cross_num_attention_heads",
    "cross_num_key_value_heads",
    "cross_head_dim",
)
# A number beyond is a slip of the pen, and what is made of it would never end or not fit into any memory.
MOST_PARTS = 2**12  # layers, iterations, heads, experts: the keys that begin with num_
LARGEST_SIZE = 2**31 - 1  # what kernels can index
LARGEST_FACTOR = 1e30  # far from float32's end, beyond which everything would be NaN
BOOLEANS = ("tie_word_embeddings", "rope_interleaved", "cross_decoder_rope", "norm_topk_prob", "use_cache")
MOE_KEYS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
QK_NORMS = ("none", "self", "all")
# What the formula of each type needs beside rope_theta.
ROPE_TYPES = {
    "default": (),
    "yoco2024": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

# Switches of the authors' code that change the computation; this architecture has none of them.
FOREIGN_SWITCHES = (
    "diff_attention",
    "diff_v2",
    "diff_v3",
    "gated_attention",
    "qk_rms_clip",
    "swiglu_limit",
    "attention_bias",
    "mlp_bias",
)
# Keys that only the two foreign schemas have: their presence means that the file was never converted.
FOREIGN_SCHEMA_KEYS = ("universal_loop", "yoco_cross_layers", "yoco_window_size", "n_self_heads", "n_layers", "d_model")
# Properties of the config.
DERIVED_KEYS = ("num_cross_decoder_layers", "layer_types", "is_moe")


class YocoUConfig(PreTrainedConfig):
    """Configuration of a YOCO-U model (Hugging Face `config.json`, `model_type: "yoco_u"`).

    Args:
        num_hidden_layers: layers that are stored, S + C.
        num_self_decoder_layers: S, default half of them.
        num_iterations: T, how often the whole self-decoder stack runs.
        sliding_window: W, keys that a self-decoder token sees, itself included.
        num_attention_heads, num_key_value_heads, head_dim: the self-decoder's.
        cross_num_attention_heads, cross_num_key_value_heads, cross_head_dim: the cross-decoder's and the global
            KV cache's, default the self-decoder's.
        rope_parameters: `{"rope_theta": float, "rope_type": "default" | "yoco2024" | "linear" | "llama3"}` and what
            `ROPE_TYPES` names for the type; a plain `rope_theta` will do.
        rope_interleaved: even/odd RoPE layout instead of the half-split one.
        cross_decoder_rope: RoPE on the cross-decoder's queries and the global keys, default none (NoPE).
        qk_norm: per-head RMSNorm of q and k, "none", "self" (self-decoder) or "all" (both decoders).
        num_experts, num_experts_per_tok, moe_intermediate_size: mixture of experts in every layer, absent = dense.
        shared_expert_intermediate_size: width of the expert that every token uses, absent = none.
        shared_expert_gate: whether a sigmoid gate scales that expert; None = whatever the checkpoint's weights say.

    Raises:
        ValueError: a value from which no model can be built.
    """

    model_type = "yoco_u"
    has_no_defaults_at_init: ClassVar[bool] = True
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_self_decoder_layers: int | None = None
    num_iterations: int = 3
    sliding_window: int = 512
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    cross_num_attention_heads: int | None = None
    cross_num_key_value_heads: int | None = None
    cross_head_dim: int | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_interleaved: bool = False
    cross_decoder_rope: bool = False
    qk_norm: str = "none"
    embedding_multiplier: float = 1.0
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool | None = None
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self._refuse_foreign(kwargs)
        for key in REQUIRED:
            if getattr(self, key) is None:
                raise ValueError(f"config key '{key}' is missing: a YOCO-U model cannot be built without it, add it.")
        self._check_positive_integers(REQUIRED)
        if self.num_self_decoder_layers is None:
            self.num_self_decoder_layers = self.num_hidden_layers // 2
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}: choose another head count or give head_dim."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        for key in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            if getattr(self, f"cross_{key}") is None:
                setattr(self, f"cross_{key}", getattr(self, key))
        self._check_positive_integers(POSITIVE_INTEGERS)  # layer_types, which transformers reads next, needs them
        given = _mapping("rope_scaling", kwargs.pop("rope_scaling", None))
        given |= _mapping("rope_parameters", self.rope_parameters)
        theta = kwargs.pop("rope_theta", None)
        if theta is not None:
            given.setdefault("rope_theta", theta)
        self.__dict__["rope_parameters"] = _merged_rope({}, given)
        super().__post_init__(**kwargs)
        self.check()

    def __setattr__(self, key: str, value: Any) -> None:
        """RoPE settings are merged into the present ones: vLLM and transformers set overrides that are mappings so."""
        if key == "rope_parameters" and self.__dict__.get(key) is not None:
            value = _merged_rope(self.__dict__[key], _mapping(key, value))
        super().__setattr__(key, value)

    @property
    def num_cross_decoder_layers(self) -> int:
        """C, the layers that read the global KV cache."""
        return self.num_hidden_layers - self.num_self_decoder_layers

    @property
    def layer_types(self) -> list[str]:
        """Attention kind of each stored layer. vLLM gives a model-wide window to configs without mixed layer types."""
        return ["sliding_attention"] * self.num_self_decoder_layers + ["full_attention"] * self.num_cross_decoder_layers

    @property
    def leaves_gate_to_weights(self) -> bool:
        """Whether nothing but the checkpoint's weights says if the shared expert is gated."""
        return self.shared_expert_intermediate_size is not None and self.shared_expert_gate is None

    @property
    def is_moe(self) -> bool:
        return self.num_experts is not None

    def uuid(self) -> str:
        """This configuration as JSON without num_iterations: what vLLM puts into its key of compiled code.

        One pass through the self-decoder is compiled and called T times, so that one artifact serves every T. Two
        other things of vLLM take in the same key and cannot tell two T of a checkpoint apart: the `system_fingerprint`
        of its answers, and the KV-cache size that `VLLM_ENABLE_STARTUP_PLAN` saves.
        """
        keys = json.loads(self.to_json_string())
        del keys["num_iterations"]
        return json.dumps(keys, sort_keys=True)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        trained = config_dict.get("num_iterations", cls.num_iterations)
        _gather_rope(kwargs)
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config.check()
        config._warn_if_retrained_depth(trained)
        return loaded

    def update(self, config_dict: dict[str, Any]) -> None:
        """Override keys of a loaded configuration (vLLM's `--hf-overrides`, but for mappings) and check the result."""
        trained = self.num_iterations
        overrides = dict(config_dict)
        self._refuse_foreign(overrides)
        for key in overrides:
            if not hasattr(self, key) and key not in ("rope_theta", "quantization_config"):
                raise ValueError(f"config key '{key}' is unknown to YOCO-U: correct the name of the override.")
        _gather_rope(overrides)
        super().update(overrides)
        self.check()
        self._warn_if_retrained_depth(trained)

    def check(self) -> None:
        """Raise ValueError unless a model can be built from the present values."""
        self._check_positive_integers(POSITIVE_INTEGERS)
        for key in BOOLEANS:
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} is {getattr(self, key)!r}: it must be true or false.")
        if not 1 <= self.num_self_decoder_layers < self.num_hidden_layers:
            raise ValueError(
                f"num_self_decoder_layers is {self.num_self_decoder_layers} of num_hidden_layers "
                f"{self.num_hidden_layers}: choose it between 1 and {self.num_hidden_layers - 1}, "
                "both decoders need a layer."
            )
        for prefix, decoder in (("", "self-decoder"), ("cross_", "cross-decoder")):
            heads = getattr(self, f"{prefix}num_attention_heads")
            kv_heads = getattr(self, f"{prefix}num_key_value_heads")
            if heads % kv_heads:
                raise ValueError(
                    f"{prefix}num_attention_heads {heads} is not divisible by {prefix}num_key_value_heads {kv_heads}: "
                    f"every KV head of the {decoder} must serve the same number of query heads."
                )
        for key in ("head_dim", "cross_head_dim"):
            rotated = key == "head_dim" or self.cross_decoder_rope
            if rotated and getattr(self, key) % 2:
                raise ValueError(f"{key} is {getattr(self, key)}: RoPE rotates pairs, choose an even size.")
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm is {self.qk_norm!r}: choose one of {', '.join(QK_NORMS)}.")
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act is {self.hidden_act!r}: YOCO-U's feed-forward is SwiGLU, set 'silu'.")
        if not isinstance(self.shared_expert_gate, bool | None):
            raise ValueError(f"shared_expert_gate is {self.shared_expert_gate!r}: set true or false, or leave it out.")
        if not _is_number(self.initializer_range) or not 0 <= self.initializer_range <= LARGEST_FACTOR:
            raise ValueError(
                f"initializer_range is {self.initializer_range!r}: "
                f"it must be a number between 0 and {LARGEST_FACTOR:g}."
            )
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(self, key)
            several = key == "eos_token_id" and isinstance(token, list) and token
            if token is not None and not all(
                _is_whole(each) and 0 <= each < self.vocab_size for each in (token if several else [token])
            ):
                raise ValueError(f"{key} is {token!r}: a token id must be between 0 and {self.vocab_size - 1}.")
        for key in ("rms_norm_eps", "embedding_multiplier"):
            value = getattr(self, key)
            if not _is_number(value) or not 0 < value <= LARGEST_FACTOR:
                raise ValueError(f"{key} is {value!r}: it must be a positive number of at most {LARGEST_FACTOR:g}.")
        _check_rope(self.rope_parameters)
        self._check_moe()

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError unless tensor parallel ranks can split all heads, or of KV heads each hold a copy of one."""
        for key in ("num_attention_heads", "cross_num_attention_heads"):
            if getattr(self, key) % ranks:
                raise ValueError(
                    f"{key} {getattr(self, key)} is not divisible by the tensor parallel size {ranks}: "
                    "choose a size that divides it."
                )
        for key in ("num_key_value_heads", "cross_num_key_value_heads"):
            heads = getattr(self, key)
            if heads % ranks and ranks % heads:
                raise ValueError(
                    f"{key} {heads} can be neither split over nor replicated on {ranks} tensor parallel ranks: "
                    "choose a size that divides it or is a multiple of it."
                )

    def _check_positive_integers(self, keys: tuple[str, ...]) -> None:
        for key in keys:
            value = getattr(self, key)
            if not _is_whole(value) or value < 1:
                raise ValueError(f"{key} is {value!r}: it must be a whole number of at least 1.")
            most = MOST_PARTS if "num_" in key else LARGEST_SIZE
            if value > most:
                raise ValueError(f"{key} is {value}: no model has so many, it must be at most {most}.")

    def _check_moe(self) -> None:
        given = [key for key in MOE_KEYS if getattr(self, key) is not None]
        if given and len(given) < len(MOE_KEYS):
            missing = [key for key in MOE_KEYS if key not in given]
            raise ValueError(
                f"{', '.join(given)} given without {', '.join(missing)}: "
                "a mixture of experts needs all three, a dense model none."
            )
        if given:
            self._check_positive_integers(MOE_KEYS)
            if self.num_experts_per_tok > self.num_experts:
                raise ValueError(
                    f"num_experts_per_tok is {self.num_experts_per_tok} of num_experts {self.num_experts}: "
                    "a token cannot use more experts than there are."
                )
        if self.shared_expert_intermediate_size is not None:
            if not given:
                raise ValueError(
                    f"shared_expert_intermediate_size is {self.shared_expert_intermediate_size} without "
                    f"{', '.join(MOE_KEYS)}: a dense model has no shared expert, remove it or give all of them."
                )
            self._check_positive_integers(("shared_expert_intermediate_size",))

    def _warn_if_retrained_depth(self, trained: int) -> None:
        if self.num_iterations != trained:
            logger.warning_once(
                f"num_iterations is overridden to {self.num_iterations}: the checkpoint was trained with {trained}, "
                "other depths usually cost quality."
            )

    def _refuse_foreign(self, keys: dict[str, Any]) -> None:
        for key in DERIVED_KEYS:
            if key in keys:
                raise ValueError(f"config key '{key}' is {keys[key]!r}: it follows from the other keys, remove it.")
        for key in FOREIGN_SCHEMA_KEYS:
            if key in keys:
                raise ValueError(
                    f"config key '{key}' is {keys[key]!r}: it belongs to another YOCO schema, "
                    "convert the checkpoint to model_type 'yoco_u' first."
                )
        for key in FOREIGN_SWITCHES:
            if keys.get(key):
                raise ValueError(
                    f"config key '{key}' is {keys[key]!r}: YOCO-U as served here computes nothing of that kind, "
                    "use a checkpoint trained without it."
                )

    def _validate_yoco2024_rope_parameters(self, rope_parameters: dict, ignore_keys: set | None = None) -> None:
        """transformers looks this method up by the name of the RoPE type; `_check_rope` has done the work."""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _gather_rope(overrides: dict[str, Any]) -> None:
    """Put every spelling of the RoPE settings under `rope_parameters`, which setting it merges."""
    given = {}
    for key in ("rope_scaling", "rope_parameters"):
        given |= _mapping(key, overrides.pop(key, None))
    if "rope_theta" in overrides:  # no attribute of a config: transformers would ignore it
        given["rope_theta"] = overrides.pop("rope_theta")
    if given:
        overrides["rope_parameters"] = given


def _merged_rope(present: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings `given` over those at `present`, of which another type keeps rope_theta alone."""
    if "type" in given:
        given.setdefault("rope_type", given.pop("type"))
    rope_type = given.get("rope_type", present.get("rope_type", "default"))
    if rope_type != present.get("rope_type"):
        present = {"rope_theta": present.get("rope_theta", 10000.0)}
    merged = present | given | {"rope_type": rope_type}
    _check_rope(merged)
    return merged


def _check_rope(rope_parameters: dict[str, Any]) -> None:
    rope_type, theta = rope_parameters.get("rope_type"), rope_parameters.get("rope_theta")
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type is {rope_type!r}: YOCO-U knows {', '.join(ROPE_TYPES)}.")
    if not _is_number(theta) or not 1 <= theta <= LARGEST_FACTOR:
        raise ValueError(f"rope_theta is {theta!r}: it must be a number between 1 and {LARGEST_FACTOR:g}.")
    known = ("rope_theta", "rope_type", *ROPE_TYPES[rope_type])
    if unknown := sorted(set(rope_parameters) - set(known)):
        raise ValueError(
            f"rope_parameters has '{unknown[0]}': RoPE of type {rope_type} is set by {', '.join(known)}, remove it."
        )
    for key in ROPE_TYPES[rope_type]:
        value = rope_parameters.get(key)
        most = LARGEST_SIZE if key == "original_max_position_embeddings" else MOST_PARTS
        if not _is_number(value) or not 1 <= value <= most:
            raise ValueError(
                f"rope_parameters has {key} {value!r}: RoPE of type {rope_type} needs a number between 1 and {most}."
            )
    if rope_type == "llama3":
        low, high = rope_parameters["low_freq_factor"], rope_parameters["high_freq_factor"]
        if low >= high:
            raise ValueError(f"low_freq_factor is {low} and high_freq_factor {high}: the first must be smaller.")


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return dict(value or {})
    raise ValueError(f"{key} is {value!r}: give a mapping with rope_theta and rope_type.")
