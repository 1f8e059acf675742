"""T·S window caches and one global cache share one pool of blocks, and a block is filled to the last byte if it can be.

A block of the pool holds either F window pages, one page of `window_block` tokens for each of F (iteration, layer)
pairs, or one global page of `global_block` tokens, which is as many bytes. vLLM's scheduler then sees T·S/F window
groups and one global group, so T·S/F + 1 block tables, however often the self-decoder loops.
"""

from dataclasses import dataclass
from math import ceil

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

# A prefix-cache hit ends at a multiple of the global block, and a shorter prompt never hits.
MAX_GLOBAL_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class WindowCacheSpec(SlidingWindowSpec):
    """KV cache of one (iteration, layer) of the self-decoder: the last W tokens."""


@dataclass(frozen=True, kw_only=True)
class GlobalCacheSpec(FullAttentionSpec):
    """The one KV cache that all cross-decoder layers read: every token."""


# The registry fills in vLLM's own specs only while it is empty, so they have to come first.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(WindowCacheSpec, SlidingWindowManager, SlidingWindowSpec)
KVCacheSpecRegistry.register(GlobalCacheSpec, FullAttentionManager, FullAttentionSpec)


@dataclass(frozen=True)
class Packing:
    """How window caches share the pool's blocks.

    Attributes:
        layers_per_block: F, window caches in a block.
        window_block: tokens of a window page.
        global_block: tokens of the global page.
    """

    layers_per_block: int
    window_block: int
    global_block: int


def choose_packing(
    window_caches: int,
    block: int,
    window_bytes: int,
    global_bytes: int,
    max_global_block: int = MAX_GLOBAL_BLOCK,
) -> Packing:
    """The packing with the fewest groups whose global block stays within `max_global_block` tokens.

    Args:
        window_caches: T·S.
        block: the smallest block, in tokens, that the attention backend takes.
        window_bytes, global_bytes: bytes of one token in one window cache and in the global cache.
        max_global_block: in tokens.

    F divides T·S, or the last group would leave part of its blocks empty. F = 1 is always possible.
    """
    divisors = [F for F in range(window_caches, 0, -1) if window_caches % F == 0]
    candidates = [Packing(F, block, ceil(F * window_bytes / global_bytes) * block) for F in divisors]
    return next((packing for packing in candidates if packing.global_block <= max_global_block), candidates[-1])
