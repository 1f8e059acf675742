"""What vLLM does, beyond names and signatures, where the plugin would be wrong or wasteful if it did otherwise."""

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def order_of_levels(support: Any) -> bool:
    """`AttentionCGSupport`: a larger value promises graphs for more kinds of batches; the plugin takes the least."""
    levels = [support.NEVER, support.UNIFORM_SINGLE_TOKEN_DECODE, support.UNIFORM_BATCH, support.ALWAYS]
    values = [level.value for level in levels]
    return values == sorted(set(values))


def use_of_uuid(normalize_value: Any) -> bool:
    """`normalize_value`: vLLM's key of compiled code takes a config's own `uuid`, which leaves out T."""
    config = SimpleNamespace(uuid=lambda: "of the config", num_iterations=3)
    return normalize_value(config) == "of the config"


def number_in_a_name(extract_layer_index: Any) -> bool:
    """`extract_layer_index`: the one number in the name of a cached layer, which all caches of the plugin have."""
    return extract_layer_index("model.kv_cache.7") == 7


def pair_of_defaults(engine_args: Any) -> bool:
    """`EngineArgs.get_batch_defaults`: tokens of a step by usage come first."""
    by_usage, _ = engine_args.get_batch_defaults(1)
    return all(isinstance(tokens, int) for tokens in by_usage.values())


def packing_rule(get_kv_cache_groups: Any, vllm_config: "VllmConfig") -> bool:
    """`get_kv_cache_groups`: five window caches and one global page of three window pages make groups of 3, 2 and 1.

    It is asked with a copy of an engine's configuration, in the layout that the plugin's backends ask for.
    """
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    settings = copy.copy(vllm_config)
    settings.cache_config = copy.copy(vllm_config.cache_config)
    settings.cache_config.kv_cache_layout = "BLNHC"
    page: dict[str, Any] = dict(num_kv_heads=1, head_size=32, dtype=torch.float32)
    window = SlidingWindowSpec(block_size=16, sliding_window=64, **page)
    specs: dict[str, Any] = {f"window.{i}": window for i in range(5)}
    specs["global.0"] = FullAttentionSpec(block_size=3 * 16, **page)
    groups = get_kv_cache_groups(settings, specs)
    return sorted(len(group.layer_names) for group in groups) == [1, 2, 3]
