"""What vLLM's scheduler knows of the caches: two specs, and the managers that it runs for them."""

from dataclasses import dataclass

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_yocou.workarounds import fill_spec_registry


@dataclass(frozen=True, kw_only=True)
class WindowCacheSpec(SlidingWindowSpec):
    """KV cache of one (iteration, layer) of the self-decoder: the last W tokens."""


@dataclass(frozen=True, kw_only=True)
class GlobalCacheSpec(FullAttentionSpec):
    """The one KV cache that all cross-decoder layers read: every token."""


fill_spec_registry()
KVCacheSpecRegistry.register(WindowCacheSpec, SlidingWindowManager, SlidingWindowSpec)
KVCacheSpecRegistry.register(GlobalCacheSpec, FullAttentionManager, FullAttentionSpec)
