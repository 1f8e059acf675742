"""Only two things are cached: T·S windows, one for each (iteration, layer), and one global KV, owned by no layer.

Both are vLLM `Attention` layers, so its runners bind their memory and build their metadata; each layer of the pool's
blocks lies side by side, which vLLM does for backends that ask for a block-outermost KV layout.
"""

from functools import cache

import torch
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import _encode_layer_name
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec, get_kv_quant_mode

from vllm_yocou.kv_cache import GlobalCacheSpec, Packing, WindowCacheSpec


@cache
def packed_backend(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """The platform's attention backend, restricted to layouts in which the caches of a block are contiguous."""
    supported = base.supported_kv_cache_layouts()
    if supported is None:
        layouts = (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC)
    else:
        # A kernel that takes a layout with the layers outermost finds the same page in the block-outermost one,
        # if it takes the stride between blocks from the tensor: true of the CPU's kernel.
        inner = {KVCacheLayout.LBHNC: KVCacheLayout.BLHNC} if base.get_name() == "CPU_ATTN" else {}
        layouts = tuple(inner.get(layout, layout) for layout in supported)
        layouts = tuple(layout for layout in layouts if layout.is_block_outermost)
    if not layouts:
        raise ValueError(
            f"the attention backend {base.get_name()} cannot be used with YOCO-U: it has no block-outermost KV layout, "
            "choose FLASH_ATTN or TRITON_ATTN."
        )
    return type(
        f"Packed{base.__name__}",
        (base,),
        {"supported_kv_cache_layouts": classmethod(lambda cls: layouts)},
    )


def smallest_block(backend: type[AttentionBackend]) -> int:
    """Tokens of the smallest KV block that the backend's kernels take."""
    sizes = backend.get_supported_kernel_block_sizes()
    return min(size.base if isinstance(size, MultipleOf) else size for size in sizes)


class CachedAttention(Attention):
    """What the two caches share: the backend, and a spec of their own instead of vLLM's choice of block size."""

    def __init__(self, num_heads, head_size, num_kv_heads, cache_config: CacheConfig, window=None, **kwargs):
        selected = get_attn_backend(
            head_size, torch.get_default_dtype(), cache_config.cache_dtype, has_sliding_window=window is not None
        )
        super().__init__(
            num_heads,
            head_size,
            head_size**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=cache_config,
            per_layer_sliding_window=window,
            attn_backend=packed_backend(selected),
            **kwargs,
        )
        self.packing: Packing | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in this cache, on this rank."""
        return self.spec(block_size=1).page_size_bytes

    def spec(self, block_size: int) -> KVCacheSpec:
        raise NotImplementedError

    def spec_arguments(self) -> dict:
        return dict(
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
        )


class WindowAttention(CachedAttention):
    """Writes and reads the window cache of one (iteration, layer): `forward(q_NHd, k_NKd, v_NKd)`."""

    def spec(self, block_size: int) -> WindowCacheSpec:
        return WindowCacheSpec(block_size=block_size, sliding_window=self.sliding_window, **self.spec_arguments())

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> WindowCacheSpec:
        return self.spec(self.packing.window_block)


class GlobalAttention(CachedAttention):
    """The global KV cache: written once per token by the global-KV module, read by every cross-decoder layer.

    Writing and reading are separate calls of vLLM's own ops. The op that writes declares no mutation, so a compiler may
    delete or reorder it unless its result is used: `write` returns a token that every `attend` takes.
    """

    def spec(self, block_size: int) -> GlobalCacheSpec:
        return GlobalCacheSpec(block_size=block_size, **self.spec_arguments())

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> GlobalCacheSpec:
        return self.spec(self.packing.global_block)

    def write(self, k_NX: torch.Tensor, v_NX: torch.Tensor) -> torch.Tensor:
        """Store keys and values (N, Kc · dc); returns the empty tensor that orders the reads behind it."""
        k_NKd = k_NX.view(-1, self.num_kv_heads, self.head_size)
        v_NKd = v_NX.view(-1, self.num_kv_heads, self.head_size_v)
        return torch.ops.vllm.unified_kv_cache_update(k_NKd, v_NKd, _encode_layer_name(self.layer_name))

    def attend(self, q_NX: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Causal attention of queries (N, Hc · dc) over the cache, (N, Hc · dc)."""
        output_NX = torch.empty_like(q_NX)
        torch.ops.vllm.unified_attention_with_output(
            q_NX.view(-1, self.num_heads, self.head_size),
            None,
            None,
            output_NX.view(-1, self.num_heads, self.head_size_v),
            _encode_layer_name(self.layer_name),
            kv_cache_dummy_dep=written,
        )
        return output_NX
