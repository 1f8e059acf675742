"""Each key of a YOCO-U config.json has one rule for its value, and a refusal is one sentence: key, value, remedy.

The rules take the place of huggingface_hub's `@strict`, which checks the configs of transformers' own models: its
errors are not ValueErrors, they take two lines, and it sees types but neither ranges nor what a user should do.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

# Larger values are typos: building such a model would never finish or would exhaust memory.
MOST_PARTS = 2**12  # layers, iterations, heads, experts: the keys that begin with num_
LARGEST_SIZE = 2**31 - 1  # what kernels can index
LARGEST_FACTOR = 1e30  # well below float32's maximum, above which everything would be NaN


class Rule(Protocol):
    """What values one key may have."""

    def complaint(self, value: Any) -> str | None:
        """What to do about a value that is refused, or None when it is accepted."""


@dataclass(frozen=True)
class Whole:
    """A whole number between two bounds; `optional` accepts None as well."""

    least: int
    most: int
    optional: bool = False

    def complaint(self, value: Any) -> str | None:
        if value is None and self.optional:
            return None
        if not is_whole(value) or value < self.least:
            return f"it must be a whole number of at least {self.least}"
        return f"no model has so many, it must be at most {self.most}" if value > self.most else None


@dataclass(frozen=True)
class Number:
    """A number up to `most`: above zero, or from zero on where `zero` says so; `optional` accepts None as well."""

    most: float
    zero: bool = False
    optional: bool = False

    def complaint(self, value: Any) -> str | None:
        if value is None and self.optional:
            return None
        if is_number(value) and 0 <= value <= self.most and (value > 0 or self.zero):
            return None
        if self.zero:
            return f"it must be a number between 0 and {self.most:g}"
        return f"it must be a positive number of at most {self.most:g}"


@dataclass(frozen=True)
class Flag:
    """True or false; `optional` accepts None as well."""

    optional: bool = False

    def complaint(self, value: Any) -> str | None:
        if isinstance(value, bool) or (value is None and self.optional):
            return None
        return "set true or false, or leave it out" if self.optional else "it must be true or false"


@dataclass(frozen=True)
class Wholes:
    """A list of whole numbers between two bounds, one at least."""

    least: int
    most: int

    def complaint(self, value: Any) -> str | None:
        whole = isinstance(value, list) and all(is_whole(each) and self.least <= each <= self.most for each in value)
        if whole and value:
            return None
        return f"it must be a list of whole numbers between {self.least} and {self.most}"


@dataclass(frozen=True)
class Choice:
    """One of some strings."""

    values: tuple[str, ...]
    remedy: str

    def complaint(self, value: Any) -> str | None:
        return None if value in self.values else self.remedy


COUNT, SIZE = Whole(1, MOST_PARTS), Whole(1, LARGEST_SIZE)
OPTIONAL_COUNT, OPTIONAL_SIZE = Whole(1, MOST_PARTS, optional=True), Whole(1, LARGEST_SIZE, optional=True)
FLAG, FACTOR, OPTIONAL_FACTOR = Flag(), Number(LARGEST_FACTOR), Number(LARGEST_FACTOR, optional=True)

# Every key that can be judged by itself. RoPE settings have rules of their own (rope.py), and what a token id may be
# depends on vocab_size (architecture.py).
KEYS: dict[str, Rule] = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "max_position_embeddings": SIZE,
    "num_self_decoder_layers": COUNT,
    "num_iterations": COUNT,
    "trained_iterations": Wholes(1, MOST_PARTS),
    "sliding_window": SIZE,
    "num_key_value_heads": COUNT,
    "head_dim": SIZE,
    "cross_num_attention_heads": COUNT,
    "cross_num_key_value_heads": COUNT,
    "cross_head_dim": SIZE,
    "tie_word_embeddings": FLAG,
    "rope_interleaved": FLAG,
    "cross_decoder_rope": FLAG,
    "norm_topk_prob": FLAG,
    "use_cache": FLAG,
    "shared_expert_gate": Flag(optional=True),
    "qk_norm": Choice(("none", "self", "all"), "choose one of none, self, all"),
    "hidden_act": Choice(("silu",), "YOCO-U's feed-forward is SwiGLU, set 'silu'"),
    "initializer_range": Number(LARGEST_FACTOR, zero=True),
    "rms_norm_eps": FACTOR,
    "embedding_multiplier": FACTOR,
    "num_experts": OPTIONAL_COUNT,
    "num_experts_per_tok": OPTIONAL_COUNT,
    "moe_intermediate_size": OPTIONAL_SIZE,
    "shared_expert_intermediate_size": OPTIONAL_SIZE,
    "differential_attention": Choice(("none", "v2", "v3"), "choose one of none, v2, v3"),
    "headwise_glu": FLAG,
    "attention_bias": FLAG,
    "qk_clip_limit": OPTIONAL_FACTOR,
    "swiglu_limit": OPTIONAL_FACTOR,
    "first_k_dense_replace": Whole(0, MOST_PARTS),
    "router_in_fp32": FLAG,
    "moe_latent_size": OPTIONAL_SIZE,
    "moe_latent_norm": FLAG,
    "residual_in_fp32": FLAG,
    "logit_scale": FACTOR,
}

# Properties of a config, which follow from its other keys.
DERIVED_KEYS = (
    "num_cross_decoder_layers",
    "layer_types",
    "is_moe",
    "is_differential",
    "num_query_heads",
    "cross_num_query_heads",
)
# Keys that only the two foreign schemas have: a file with one of them was never converted.
FOREIGN_SCHEMA_KEYS = ("universal_loop", "yoco_cross_layers", "yoco_window_size", "n_self_heads", "n_layers", "d_model")
# Switches of theirs, in whose place a converted checkpoint has keys of ours.
CONVERTED_SWITCHES = ("diff_attention", "diff_v2", "diff_v3", "qk_rms_clip")
# Switches of other schemas that change the computation, and that nothing here computes.
FOREIGN_SWITCHES = ("gated_attention", "mlp_bias")


def check_keys(config: object, keys: Iterable[str] = KEYS) -> None:
    """Raise ValueError unless each of `keys` has a value that its rule accepts."""
    for key in keys:
        value = getattr(config, key)
        if (complaint := KEYS[key].complaint(value)) is not None:
            raise ValueError(f"{key} is {value!r}: {complaint}.")


def refuse_foreign(given: dict[str, Any]) -> None:
    """Raise ValueError if a mapping of config keys holds one that is derived, of another schema or of another model."""
    for key in DERIVED_KEYS:
        if key in given:
            raise ValueError(f"config key '{key}' is {given[key]!r}: it follows from the other keys, remove it.")
    of_schema = [key for key in FOREIGN_SCHEMA_KEYS if key in given]
    of_schema += [key for key in CONVERTED_SWITCHES if given.get(key)]
    for key in of_schema:
        raise ValueError(
            f"config key '{key}' is {given[key]!r}: it belongs to another YOCO schema, "
            "convert the checkpoint to model_type 'yoco_u' first."
        )
    for key in FOREIGN_SWITCHES:
        if given.get(key):
            raise ValueError(
                f"config key '{key}' is {given[key]!r}: YOCO-U as served here computes nothing of that kind, "
                "use a checkpoint trained without it."
            )


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[int | float]:
    return is_whole(value) or isinstance(value, float)
