"""The keys of a source's config in terms of ours: nothing is ignored or guessed unless its name says it is metadata.

A key that this architecture has no place for is refused by name, and so is the lack of a key that changes what is
computed.
"""

from typing import Any

from vllm_yocou.config import YocoUConfig
from vllm_yocou.config_keys import CONVERTED_SWITCHES, FOREIGN_SWITCHES

# Of transformers' own config files; they change nothing that is computed.
METADATA = {
    "architectures",
    "auto_map",
    "dtype",
    "initializer_range",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
KEPT = {"bos_token_id", "eos_token_id", "pad_token_id", "vocab_size"}


def translated(
    keys: dict[str, Any], names: dict[str, str], context: int | None, required: tuple[str, ...]
) -> dict[str, Any]:
    """The `keys` that have a value, under our names.

    Args:
        names: their key -> ours.
        context: longest context in tokens, for sources that do not say.
        required: keys of theirs that must have a value.
    """
    for key in required:
        if keys.get(key) is None:
            raise ValueError(f"the source's '{key}' is missing, and a guess could change what is computed: add it.")
    ours = {names.get(key, key): value for key, value in keys.items() if key in names or key in KEPT}
    ours = {key: value for key, value in ours.items() if value is not None}
    return ours | {"max_position_embeddings": context_length(ours.get("max_position_embeddings"), context)}


def context_length(said: Any, asked: int | None) -> Any:
    """The longest context in tokens: what was `asked` for, or else what the source has `said`, None or -1 if nothing.

    Raises:
        ValueError: nobody says.
    """
    length = asked or said
    if length is None or length == -1:
        raise ValueError("the source does not say how long its context is (max_seq_len): give --context.")
    return length


def refuse_unknown(keys: dict[str, Any], known: set[str], config: YocoUConfig) -> None:
    """Raise ValueError for keys without a place here, unless they repeat what `config` says under a name of ours."""
    switches = [key for key in FOREIGN_SWITCHES + CONVERTED_SWITCHES if keys.get(key) and key not in known]
    if switches:
        raise ValueError(
            f"the source's '{switches[0]}' is {keys[switches[0]]!r}: YOCO-U as served here computes nothing of that "
            "kind, convert a checkpoint trained without it."
        )
    known = known | METADATA | KEPT | set(FOREIGN_SWITCHES + CONVERTED_SWITCHES)
    unknown = [key for key, value in keys.items() if key not in known and value is not None]
    unknown = [key for key in unknown if getattr(config, key, None) != keys[key]]
    if unknown:
        listed = ", ".join(f"'{key}' ({keys[key]!r})" for key in unknown)
        raise ValueError(
            f"the source has {listed}, and what that changes is not known here: remove what does not change the "
            "computation."
        )


def whole_number(keys: dict[str, Any], key: str) -> int:
    """The value of `key`, or ValueError unless it is a whole number of at least 1."""
    value = keys.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"the source's '{key}' is {value!r}: it must be a whole number of at least 1.")
    return value
