"""A RoPE type is defined here alone: its settings in config.json, their checks, and its table of frequencies.

serving/rope.py says which of vLLM's layers computes it, reference/rotation.py how a vector is rotated by it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm_yocou.config_keys import LARGEST_FACTOR, LARGEST_SIZE, MOST_PARTS, is_number

if TYPE_CHECKING:
    import torch

# The settings that each type's formula needs in addition to rope_theta.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "yoco2024": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def inverse_frequencies(
    head_dim: int, rope_parameters: dict[str, Any], dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """Angular frequencies (d/2,) in radians per position, in `dtype`.

    "default": theta^(-2i/d) (arXiv 2104.09864, section 3.2). "yoco2024": theta^(-linspace(0, 1, d/2)), whose last
    frequency is exactly 1/theta, as in the code of arXiv 2405.05254. "linear" (arXiv 2306.15595): the default's over
    `factor`. "llama3" (Llama 3.1's code): the default's over `factor` where they make fewer than `low_freq_factor`
    turns within `original_max_position_embeddings` positions, unchanged where they make more than `high_freq_factor`,
    with a linear transition between the two.
    """
    import torch  # here, so that `vllm-yocou kv`, which checks RoPE settings and computes nothing, starts without it

    rope_type = rope_parameters["rope_type"]
    if rope_type == "yoco2024":
        exponents = torch.linspace(0, 1, head_dim // 2, dtype=dtype, device=device)
    else:
        exponents = torch.arange(0, head_dim, 2, dtype=dtype, device=device) / head_dim
    frequencies = rope_parameters["rope_theta"] ** -exponents
    if rope_type == "linear":
        return frequencies / rope_parameters["factor"]
    if rope_type == "llama3":
        low, high = rope_parameters["low_freq_factor"], rope_parameters["high_freq_factor"]
        turns = frequencies * (rope_parameters["original_max_position_embeddings"] / (2 * math.pi))
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / rope_parameters["factor"])
    return frequencies


def gathered(keys: dict[str, Any]) -> dict[str, Any]:
    """Take every spelling of the RoPE settings out of `keys` and return them as one mapping.

    `rope_parameters` wins over its older name `rope_scaling`, and what either says over a plain `rope_theta`.

    Raises:
        ValueError: one of the two names holds something other than a mapping.
    """
    given: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given |= as_mapping(key, keys.pop(key, None))
    if (theta := keys.pop("rope_theta", None)) is not None:
        given.setdefault("rope_theta", theta)
    return given


def as_mapping(key: str, value: Any) -> dict[str, Any]:
    """A copy of the settings that `key` holds, empty where it holds None."""
    if value is None or isinstance(value, dict):
        return dict(value or {})
    raise ValueError(f"{key} is {value!r}: give a mapping with rope_theta and rope_type.")


def merged(present: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`present` settings overridden by `given` ones, checked; a change of type keeps nothing but rope_theta."""
    given = dict(given)
    if "type" in given:  # the older name
        given.setdefault("rope_type", given.pop("type"))
    rope_type = given.get("rope_type", present.get("rope_type", "default"))
    if rope_type != present.get("rope_type"):
        present = {"rope_theta": present.get("rope_theta", 10000.0)}
    result = present | given | {"rope_type": rope_type}
    check(result)
    return result


def check(rope_parameters: dict[str, Any]) -> None:
    """Raise ValueError unless the settings are those of a known type, all of them and no others."""
    rope_type, theta = rope_parameters.get("rope_type"), rope_parameters.get("rope_theta")
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type is {rope_type!r}: YOCO-U knows {', '.join(ROPE_TYPES)}.")
    if not is_number(theta) or not 1 <= theta <= LARGEST_FACTOR:
        raise ValueError(f"rope_theta is {theta!r}: it must be a number between 1 and {LARGEST_FACTOR:g}.")
    known = ("rope_theta", "rope_type", *ROPE_TYPES[rope_type])
    if unknown := sorted(set(rope_parameters) - set(known)):
        raise ValueError(
            f"rope_parameters has '{unknown[0]}': RoPE of type {rope_type} is set by {', '.join(known)}, remove it."
        )
    for key in ROPE_TYPES[rope_type]:
        value = rope_parameters.get(key)
        most = LARGEST_SIZE if key == "original_max_position_embeddings" else MOST_PARTS
        if not is_number(value) or not 1 <= value <= most:
            raise ValueError(
                f"rope_parameters has {key} {value!r}: RoPE of type {rope_type} needs a number between 1 and {most}."
            )
    if rope_type == "llama3":
        low, high = rope_parameters["low_freq_factor"], rope_parameters["high_freq_factor"]
        if low >= high:
            raise ValueError(f"low_freq_factor is {low} and high_freq_factor {high}: the first must be smaller.")
