"""Every Architecture that exists can be built: what one YOCO-U model is, by the keys of its config.json.

The keys, their defaults and their meaning are the checkpoint format of YOCO-U (arXiv 2604.01220): S self-decoder
layers with a sliding window of W tokens run T times with the same weights, then C cross-decoder layers read one global
KV cache. config_keys.py says what each key may hold, rope.py what RoPE may be; here is what relates keys to each other.

Nothing here imports torch or transformers, whose configs import torch: `vllm-yocou kv` needs neither.
"""

from dataclasses import dataclass, fields
from typing import Any

from vllm_yocou import rope
from vllm_yocou.config_keys import check_keys, is_whole, refuse_foreign

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
MOE_KEYS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# The authors' switches. A saved file names those that are on, so that one without them is as older versions wrote it.
SWITCHES = (
    "differential_attention",
    "headwise_glu",
    "attention_bias",
    "qk_clip_limit",
    "swiglu_limit",
    "first_k_dense_replace",
    "router_in_fp32",
    "moe_latent_size",
    "moe_latent_norm",
    "residual_in_fp32",
    "logit_scale",
)
# Values of keys that a file leaves out, until `complete` refuses or derives them.
MISSING: Any = None
DERIVED: Any = None


@dataclass(kw_only=True)
class Architecture:
    """The keys that describe a YOCO-U model. `Architecture.of` reads them from a config.json's content.

    Attributes:
        num_hidden_layers: layers that are stored, S + C.
        num_self_decoder_layers: S, by default half of them.
        num_iterations: T, how often the whole self-decoder stack runs.
        trained_iterations: every T that the checkpoint was trained for, by default its own alone.
        sliding_window: W, keys that a self-decoder token sees, itself included.
        num_attention_heads, num_key_value_heads, head_dim: the self-decoder's.
        cross_num_attention_heads, cross_num_key_value_heads, cross_head_dim: the cross-decoder's and the global
            KV cache's, by default the self-decoder's.
        rope_parameters: `{"rope_theta": float, "rope_type": "default" | "yoco2024" | "linear" | "llama3"}` and what
            `rope.ROPE_TYPES` lists for the type; a plain `rope_theta` key is enough.
        rope_interleaved: even/odd RoPE layout instead of the half-split one.
        cross_decoder_rope: RoPE on the cross-decoder's queries and the global keys, by default none (NoPE).
        qk_norm: per-head RMSNorm of q and k: "none", "self" (self-decoder) or "all" (both decoders).
        num_experts, num_experts_per_tok, moe_intermediate_size: mixture of experts in every layer, absent = dense.
        shared_expert_intermediate_size: width of the expert that every token uses, absent = none.
        shared_expert_gate: whether a sigmoid gate scales that expert; None = the checkpoint's weights decide.

    Those of the authors' family, off by default:
        differential_attention: "v2" or "v3": heads have two queries each, whose outputs are subtracted; sigmoid gates
            scale the second ("v2") or both ("v3").
        headwise_glu: a sigmoid gate scales every head's output.
        attention_bias: biases on q, k, v and o, and on the global k and v.
        qk_clip_limit: the norms that `qk_norm` places shrink heads whose root mean square exceeds this, and leave
            others as they are.
        swiglu_limit: SwiGLU's gate is at most this, and its other factor within plus and minus this.
        first_k_dense_replace: stored layers, from the first on, that are dense in a mixture of experts.
        router_in_fp32: the router's weights and products are float32, whatever the model's dtype.
        moe_latent_size, moe_latent_norm: routed experts read and write vectors of this width, with an RMSNorm after
            the projection to it and one before the projection back.
        residual_in_fp32: the sum that layers add to is float32, whatever the model's dtype.
        logit_scale: a factor of the logits.

    Raises:
        ValueError: a value from which no model can be built; the sentence names the key, the value and the remedy.
    """

    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_self_decoder_layers: int = DERIVED
    num_iterations: int = 3
    trained_iterations: list[int] = DERIVED
    sliding_window: int = 512
    num_attention_heads: int = MISSING
    num_key_value_heads: int = DERIVED
    head_dim: int = DERIVED
    cross_num_attention_heads: int = DERIVED
    cross_num_key_value_heads: int = DERIVED
    cross_head_dim: int = DERIVED
    rope_parameters: dict[str, Any] = DERIVED
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
    differential_attention: str = "none"
    headwise_glu: bool = False
    attention_bias: bool = False
    qk_clip_limit: float | None = None
    swiglu_limit: float | None = None
    first_k_dense_replace: int = 0
    router_in_fp32: bool = False
    moe_latent_size: int | None = None
    moe_latent_norm: bool = False
    residual_in_fp32: bool = False
    logit_scale: float = 1.0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = MISSING
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self) -> None:
        self.complete()
        self.rope_parameters = rope.merged({}, rope.as_mapping("rope_parameters", self.rope_parameters))
        self.check()

    @classmethod
    def of(cls, keys: dict[str, Any]) -> "Architecture":
        """The architecture that the content of a config.json describes; keys that do not belong to it are left out."""
        keys = dict(keys)
        refuse_foreign(keys)
        keys["rope_parameters"] = rope.gathered(keys)
        own = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in keys.items() if key in own})

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
        """Whether only the checkpoint's weights say if the shared expert is gated."""
        return self.shared_expert_intermediate_size is not None and self.shared_expert_gate is None

    @property
    def is_moe(self) -> bool:
        return self.num_experts is not None

    @property
    def is_differential(self) -> bool:
        return self.differential_attention != "none"

    @property
    def num_query_heads(self) -> int:
        """Heads that `q_proj` makes in the self-decoder: differential attention subtracts the outputs of two."""
        return self.num_attention_heads * (2 if self.is_differential else 1)

    @property
    def cross_num_query_heads(self) -> int:
        """The same in the cross-decoder."""
        return self.cross_num_attention_heads * (2 if self.is_differential else 1)

    def has_experts(self, layer: int) -> bool:
        """Whether the stored layer of this number, counted through both decoders, is a mixture of experts."""
        return self.is_moe and layer >= self.first_k_dense_replace

    def complete(self) -> None:
        """Derive the sizes that were left out; raise ValueError if a required key is missing or a value is refused."""
        for key in REQUIRED:
            if getattr(self, key) is None:
                raise ValueError(f"config key '{key}' is missing: a YOCO-U model cannot be built without it, add it.")
        check_keys(self, REQUIRED)
        if self.num_self_decoder_layers is None:
            self.num_self_decoder_layers = self.num_hidden_layers // 2
        if self.trained_iterations is None:
            self.trained_iterations = [self.num_iterations]
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
        check_keys(self)

    def check(self) -> None:
        """Raise ValueError unless a model can be built from the present values."""
        check_keys(self)
        rope.check(self.rope_parameters)
        self._check_layers()
        self._check_heads()
        self._check_experts()
        self._check_combinations()
        self._check_token_ids()

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError unless tensor parallel ranks can split all heads, or KV heads be replicated evenly."""
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

    def _check_layers(self) -> None:
        if not 1 <= self.num_self_decoder_layers < self.num_hidden_layers:
            raise ValueError(
                f"num_self_decoder_layers is {self.num_self_decoder_layers} of num_hidden_layers "
                f"{self.num_hidden_layers}: choose it between 1 and {self.num_hidden_layers - 1}, "
                "both decoders need a layer."
            )

    def _check_heads(self) -> None:
        for prefix, decoder in (("", "self-decoder"), ("cross_", "cross-decoder")):
            heads = getattr(self, f"{prefix}num_attention_heads")
            kv_heads = getattr(self, f"{prefix}num_key_value_heads")
            if heads % kv_heads:
                raise ValueError(
                    f"{prefix}num_attention_heads {heads} is not divisible by {prefix}num_key_value_heads {kv_heads}: "
                    f"every KV head of the {decoder} must serve the same number of query heads."
                )
        for key in ("head_dim", "cross_head_dim") if self.cross_decoder_rope else ("head_dim",):
            if getattr(self, key) % 2:
                raise ValueError(f"{key} is {getattr(self, key)}: RoPE rotates pairs, choose an even size.")

    def _check_experts(self) -> None:
        given = [key for key in MOE_KEYS if getattr(self, key) is not None]
        missing = [key for key in MOE_KEYS if key not in given]
        if given and missing:
            raise ValueError(
                f"{', '.join(given)} given without {', '.join(missing)}: "
                "a mixture of experts needs all three, a dense model none."
            )
        if self.num_experts and self.num_experts_per_tok and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok} of num_experts {self.num_experts}: "
                "a token cannot use more experts than there are."
            )
        if self.shared_expert_intermediate_size is not None and missing:
            raise ValueError(
                f"shared_expert_intermediate_size is {self.shared_expert_intermediate_size} without "
                f"{', '.join(MOE_KEYS)}: a dense model has no shared expert, remove it or give all of them."
            )
        if self.shared_expert_gate and self.shared_expert_intermediate_size is None:
            raise ValueError(
                "shared_expert_gate is True without shared_expert_intermediate_size: there is no shared expert to "
                "gate, remove the one or give the other."
            )

    def _check_combinations(self) -> None:
        """Of the authors' switches, those that mean nothing with or without another key."""
        if self.headwise_glu and self.is_differential:
            raise ValueError(
                f"headwise_glu is true with differential_attention '{self.differential_attention}', whose gates take "
                "its place: choose one of them."
            )
        if self.qk_clip_limit is not None and self.qk_norm == "none":
            raise ValueError(
                f"qk_clip_limit is {self.qk_clip_limit} with qk_norm 'none': it changes those norms, set qk_norm to "
                "'self' or 'all' or remove it."
            )
        if self.first_k_dense_replace >= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace is {self.first_k_dense_replace} of num_hidden_layers "
                f"{self.num_hidden_layers}: a mixture of experts needs a layer with experts, choose fewer."
            )
        for key in ("first_k_dense_replace", "router_in_fp32", "moe_latent_size"):
            if getattr(self, key) and not self.is_moe:
                raise ValueError(
                    f"{key} is {getattr(self, key)} without {', '.join(MOE_KEYS)}: a dense model has no experts, "
                    "remove it or give all of them."
                )
        if self.moe_latent_norm and self.moe_latent_size is None:
            raise ValueError("moe_latent_norm is true without moe_latent_size: there is nothing to norm, remove it.")

    def _check_token_ids(self) -> None:
        for key in TOKEN_IDS:
            given = getattr(self, key)
            several = key == "eos_token_id" and isinstance(given, list) and given
            tokens = given if several else [given]
            if given is not None and not all(is_whole(token) and 0 <= token < self.vocab_size for token in tokens):
                raise ValueError(f"{key} is {given!r}: a token id must be between 0 and {self.vocab_size - 1}.")
