"""Only two things are cached: T·S windows, one for each (iteration, layer), and one global KV, owned by no layer.

Both are vLLM `Attention` layers, so its runners bind their memory and build their metadata.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context, unified_kv_cache_update
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, get_kv_quant_mode

from vllm_yocou.options import Options
from vllm_yocou.rows.hand_over import RowOwner, RowSlots, StepRows
from vllm_yocou.rows.prefill_node import PrefillNode
from vllm_yocou.serving.backend import packed_backend, row_selecting_backend, served_backend, smallest_block
from vllm_yocou.serving.batch_invariance import is_fixed
from vllm_yocou.serving.cache_specs import GlobalCacheSpec, WindowCacheSpec
from vllm_yocou.serving.capacity import Capacity, Load
from vllm_yocou.serving.kept_views import Views, keys_and_values
from vllm_yocou.serving.packing import Packing

WINDOW_ATTENTION = "vllm::yocou_attend_windows"
CROSS_ATTENTION = "vllm::yocou_attend_global"

logger = logging.getLogger("vllm.plugins.yocou")


def uses_kernels(vllm_config: VllmConfig) -> bool:
    """Whether the plugin's kernels take the place of vLLM's: they norm heads, and do not clip them."""
    clips = vllm_config.model_config.hf_config.qk_clip_limit is not None
    return Options.of(vllm_config.additional_config).kernels and not clips


class Cache(Attention):
    """What the two caches share: the backend, and a spec of their own instead of vLLM's choice of block size."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        num_heads: int,
        head_size: int,
        num_kv_heads: int,
        window: int | None = None,
        **kwargs: Any,
    ):
        cache_config = vllm_config.cache_config
        base = served_backend(vllm_config, head_size, windowed=window is not None)
        kernels = uses_kernels(vllm_config)
        super().__init__(
            num_heads,
            head_size,
            head_size**-0.5,
            num_kv_heads=num_kv_heads,
            cache_config=cache_config,
            per_layer_sliding_window=window,
            attn_backend=self.backend_over(base, kernels),
            **kwargs,
        )
        # The plugin's kernels read and write the dtype that the model computes in.
        self.by_kernel = kernels and self.kv_cache_torch_dtype == torch.get_default_dtype()

    @staticmethod
    def backend_over(base: type[AttentionBackend], kernels: bool) -> type[AttentionBackend]:
        return packed_backend(base, is_fixed())

    @property
    def kv_cache(self) -> torch.Tensor:
        """The memory that vLLM has given to this cache."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, kv_cache: torch.Tensor) -> None:
        """vLLM sets it to give memory, and sets it to an empty tensor to take it back."""
        self._kv_cache = kv_cache
        self._views: Views | None = None

    @property
    def views(self) -> Views:
        """Keys and values of `kv_cache`, made when first asked for."""
        if self._views is None:
            self._views = keys_and_values(self._kv_cache)
        return self._views

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in this cache, on this rank."""
        return self.attn_backend.customize_spec(self.spec(block_size=1)).page_size_bytes

    def quantized(self, q_NHd: torch.Tensor) -> torch.Tensor:
        """Queries (N, heads, d), cast to the cache's dtype if the backend requires it."""
        return (
            q_NHd if self.query_quant is None else self.query_quant(q_NHd.flatten(1), self._q_scale)[0].view_as(q_NHd)
        )

    def spec(self, block_size: int) -> AttentionSpec:
        raise NotImplementedError

    def spec_arguments(self) -> dict[str, Any]:
        return dict(
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            head_size_v=self.head_size_v,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
        )


@dataclass(frozen=True)
class Loop:
    """The window caches of one stored layer, shared by all of them.

    Attributes:
        names: of the caches in vLLM's forward context, by iteration.
        step: takes the place of vLLM's write and attention where a cache is `by_kernel`: from (name, q_NHd, k_NKd,
            v_NKd, out_NHd) as they are projected, it also norms and rotates queries and keys.
    """

    names: list[str]
    step: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None


class WindowCache(Cache):
    """Owns the window cache of one (iteration, layer); `attend_windows` writes and reads it."""

    sliding_window: int

    def __init__(self, vllm_config: VllmConfig, *args: Any, loop: Loop, **kwargs: Any):
        super().__init__(vllm_config, *args, **kwargs)
        self.loop = loop

    def spec(self, block_size: int) -> WindowCacheSpec:
        return WindowCacheSpec(block_size=block_size, sliding_window=self.sliding_window, **self.spec_arguments())

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> WindowCacheSpec:
        return self.spec(packing_of(vllm_config).window_block)


class GlobalCache(Cache, RowOwner):
    """The global KV cache: written once per token by the global-KV module, read by every cross-decoder layer.

    A KV connector loads and saves it where it is written, once a step: a step may have any number of readers, or none.
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any):
        super().__init__(vllm_config, *args, **kwargs)
        self.vllm_config = vllm_config
        self.rows = RowSlots(vllm_config.scheduler_config.max_num_seqs, PrefillNode.of(vllm_config))

    @staticmethod
    def backend_over(base: type[AttentionBackend], kernels: bool) -> type[AttentionBackend]:
        return row_selecting_backend(base, kernels, is_fixed())

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the memory that vLLM has allocated, and say how many requests the whole pool holds."""
        super().bind_kv_cache(kv_cache)
        blocks = self.vllm_config.cache_config.num_gpu_blocks
        # vLLM leaves the number unset while it binds the small pool in which it measures CUDA graphs.
        if blocks is not None and get_tensor_model_parallel_rank() == 0:
            describe_pool(self.vllm_config, blocks)

    def step_rows(self) -> StepRows | None:
        """The rows of this step that `attend` takes; None if it takes all."""
        metadata = self.step_metadata()
        return None if metadata is None else self.rows.of(metadata)

    def wanted_rows(self) -> int:
        """How many of this step's rows in the cross-decoder somebody reads."""
        return self.rows.wanted_of(self.step_metadata())

    def step_metadata(self) -> Any:
        """Of this step's attention over the cache; None where vLLM runs it without."""
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, list):  # as vLLM's attention op reads it
            metadata = metadata[0]
        return None if metadata is None else metadata[self.layer_name]

    def spec(self, block_size: int) -> GlobalCacheSpec:
        return GlobalCacheSpec(block_size=block_size, **self.spec_arguments())

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> GlobalCacheSpec:
        return self.spec(packing_of(vllm_config).global_block)

    def write(self, k_NX: torch.Tensor, v_NX: torch.Tensor) -> torch.Tensor:
        """Store keys and values (N, Kc · dc); returns the empty tensor that orders the reads after it."""
        k_NKd = k_NX.view(-1, self.num_kv_heads, self.head_size)
        v_NKd = v_NX.view(-1, self.num_kv_heads, self.head_size_v)
        write_global(k_NKd, v_NKd, self.layer_name)
        return k_NX.new_empty(0)

    def attend(self, q_MX: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """Causal attention of the queries of the selected rows (M, Hc · dc) over the cache, (M, Hc · dc)."""
        output_MX = torch.empty_like(q_MX)
        torch.ops.vllm.yocou_attend_global(
            self.quantized(q_MX.view(-1, self.num_heads, self.head_size)),
            output_MX.view(-1, self.num_heads, self.head_size_v),
            written,
            _encode_layer_name(self.layer_name),
        )
        return output_MX


def window_caches(vllm_config: VllmConfig) -> list[WindowCache]:
    """The window caches that the model has built."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [layer for layer in layers if isinstance(layer, WindowCache)]


def packing_of(vllm_config: VllmConfig) -> Packing:
    """How the caches that the model has built share the blocks of one pool."""
    windows = window_caches(vllm_config)
    layers = vllm_config.compilation_config.static_forward_context.values()
    (global_cache,) = (layer for layer in layers if isinstance(layer, GlobalCache))
    options = Options.of(vllm_config.additional_config)
    return Packing.choose(
        window_caches=len(windows),
        block=smallest_block(global_cache.attn_backend, global_cache.spec(block_size=1)),
        window_bytes=windows[0].token_bytes,
        global_bytes=global_cache.token_bytes,
        max_global_block=options.longest_global_block(windows[0].sliding_window),
    )


def describe_pool(vllm_config: VllmConfig, blocks: int) -> None:
    """Log how many requests of the maximum length fit, unless every cache keeps every token: vLLM's figure is right."""
    scheduler = vllm_config.scheduler_config
    if scheduler.disable_hybrid_kv_cache_manager:
        return
    load = Load(
        tokens=vllm_config.model_config.max_model_len,
        window=window_caches(vllm_config)[0].sliding_window,
        chunk=scheduler.max_num_batched_tokens,
        steps=vllm_config.max_concurrent_batches,
        decoded=1 + vllm_config.num_speculative_tokens,
    )
    capacity = Capacity.of(packing_of(vllm_config), load, blocks, spare=int(scheduler.watermark * blocks))
    logger.info("%s", capacity.describe(load.tokens, scheduler.max_num_seqs))


def attend_windows(
    q_NHd: torch.Tensor,
    k_NKd: torch.Tensor,
    v_NKd: torch.Tensor,
    out_NHd: torch.Tensor,
    iteration: torch.Tensor,
    layer_name: LayerNameType,
) -> None:
    """Write this step's keys and values into the window cache of (iteration, layer) and attend over it, into `out_NHd`.

    One pass through the self-decoder is compiled once and called T times, so which cache it means must be data: a
    Python integer would stay the first iteration's permanently, since vLLM drops the guards that would notice.
    `iteration` is a scalar on the CPU, read here, outside every graph; `layer_name` is that of any cache of the layer,
    the same in every call.
    """
    layers = get_forward_context().no_compile_layers
    loop: Loop = layers[_resolve_layer_name(layer_name)].loop
    name = loop.names[int(iteration)]
    cache: WindowCache = layers[name]
    if cache.by_kernel:
        assert loop.step is not None
        loop.step(name, q_NHd, k_NKd, v_NKd, out_NHd)
        return
    write_and_attend_window(cache.quantized(q_NHd), k_NKd, v_NKd, out_NHd, name)


@eager_break_during_capture  # outermost: what a KV connector does must not be captured
@maybe_transfer_kv_layer
def write_and_attend_window(
    q_NHd: torch.Tensor, k_NKd: torch.Tensor, v_NKd: torch.Tensor, out_NHd: torch.Tensor, layer_name: str
) -> None:
    """Write keys and values into the window cache called `layer_name` and attend over it, into `out_NHd`.

    A KV connector loads before the write, where vLLM's own op waits for it after: a load of whole pages would undo what
    this step has written into the last one.
    """
    metadata, cache, kv_cache, slots = get_attention_context(layer_name)
    implementation: Any = cache.impl
    if slots is not None:  # as in vLLM's op; None while vLLM warms up
        implementation.do_kv_cache_update(cache, k_NKd, v_NKd, kv_cache, slots)
    implementation.forward(cache, q_NHd, k_NKd, v_NKd, kv_cache, metadata, output=out_NHd)


@eager_break_during_capture
@maybe_transfer_kv_layer
def write_global(k_NKd: torch.Tensor, v_NKd: torch.Tensor, layer_name: str) -> None:
    """Wait for what a KV connector loads into the global cache, write this step's keys and values, let it save."""
    unified_kv_cache_update(k_NKd, v_NKd, layer_name)


@eager_break_during_capture
def attend_global(q_MHd: torch.Tensor, out_MHd: torch.Tensor, written: torch.Tensor, layer_name: LayerNameType) -> None:
    """Attend over the global cache, into `out_MHd`; `written` orders it after the write."""
    metadata, cache, kv_cache, _ = get_attention_context(_resolve_layer_name(layer_name))
    implementation: Any = cache.impl
    implementation.forward(cache, q_MHd, None, None, kv_cache, metadata, output=out_MHd)


def without_result(*args: Any) -> None:
    """What a compiler traces in place of an op that only writes into an argument."""


direct_register_custom_op(
    op_name=WINDOW_ATTENTION.removeprefix("vllm::"),
    op_func=attend_windows,
    mutates_args=["out_NHd"],
    fake_impl=without_result,
)
direct_register_custom_op(
    op_name=CROSS_ATTENTION.removeprefix("vllm::"),
    op_func=attend_global,
    mutates_args=["out_MHd"],
    fake_impl=without_result,
)
