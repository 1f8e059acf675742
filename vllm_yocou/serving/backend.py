"""vLLM's attention kernels over block-outermost KV memory, and with fewer queries than keys where rows skip.

Each of these backends is one of vLLM's own under a name of its own. Two answers change what is computed: the KV layouts
it asks for, in which the packed caches of a block lie side by side, and, for the global cache, the metadata builder,
which leaves out the rows that the row selection leaves out.
"""

from contextlib import suppress
from functools import cache
from unittest.mock import patch

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout, get_kv_quant_mode

from vllm_yocou.rows.hand_over import StepRows, row_slots
from vllm_yocou.rows.metrics import RowCounters
from vllm_yocou.rows.selection import RowSelector, SelectedRows, share_experts
from vllm_yocou.serving.batch_invariance import breaks_promise, check_backend
from vllm_yocou.serving.kept_views import KeptViews
from vllm_yocou.serving.row_by_row import RowByRow
from vllm_yocou.workarounds import check_cache_dtype, widen_decode_scratch

# vLLM's backends that this plugin builds on, and the KV layouts in which it runs them. The CPU's kernel reads
# head-major pages and takes the stride between blocks from the tensor; CUDA's take any layout.
LAYOUTS = {
    "CPU_ATTN": (KVCacheLayout.BLHNC,),
    "FLASH_ATTN": (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC),
    "TRITON_ATTN": (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC),
}


def served_backend(vllm_config: VllmConfig, head_size: int, windowed: bool) -> type[AttentionBackend]:
    """vLLM's backend for a cache, or the next in vLLM's own order that accepts it and that the plugin builds on.

    Args:
        windowed: whether the cache keeps a window only.

    Raises:
        ValueError: if there is none, or the user chose another, or if no kernels read caches of this dtype.
    """
    cache_dtype, attention = vllm_config.cache_config.cache_dtype, vllm_config.attention_config
    if get_kv_quant_mode(cache_dtype).is_per_token_head:
        raise ValueError(
            f"--kv-cache-dtype {cache_dtype} cannot be used with YOCO-U: vLLM would write a scale for each token into "
            "blocks that other caches share, use fp8 or auto."
        )

    def select() -> type[AttentionBackend]:
        return get_attn_backend(head_size, torch.get_default_dtype(), cache_dtype, has_sliding_window=windowed)

    # The layer's own heads: asked without a spec, vLLM answers for those of the model's `head_dim`.
    spec = FullAttentionSpec(
        block_size=1,
        num_kv_heads=1,
        head_size=head_size,
        dtype=torch.get_default_dtype(),
        kv_quant_mode=get_kv_quant_mode(cache_dtype),
    )
    base = select()
    chosen = attention.backend is not None or attention.backend_per_kind
    for candidate in [] if chosen or is_usable(base, spec) else in_vllms_order():
        with patch.object(attention, "backend", candidate), suppress(ValueError):  # which names why it does not accept
            if is_usable(accepted := select(), spec):
                base = accepted
                break
    if not is_built_on(base, spec):
        raise ValueError(
            f"the attention backend {base.get_name()} cannot be used with YOCO-U: the plugin packs KV caches for "
            f"{', '.join(LAYOUTS)}, whose kernels take pages of any multiple, choose one of these."
        )
    check_backend(base.get_name())
    check_cache_dtype(base, cache_dtype)
    return base


def is_usable(backend: type[AttentionBackend], spec: AttentionSpec) -> bool:
    """Whether the plugin builds on it and it keeps what VLLM_BATCH_INVARIANT promises, if that is asked for."""
    return is_built_on(backend, spec) and not breaks_promise(backend.get_name())


def is_built_on(backend: type[AttentionBackend], spec: AttentionSpec) -> bool:
    """Whether the plugin builds on it: packing makes the global page some multiple of the window page."""
    sizes = backend.get_supported_kernel_block_sizes(spec) if backend.get_name() in LAYOUTS else []
    return any(isinstance(size, MultipleOf) for size in sizes)


def in_vllms_order() -> list[AttentionBackendEnum]:
    """The backends that the plugin builds on, the one first that vLLM would choose first on this device."""
    if not current_platform.is_cuda():
        return [AttentionBackendEnum[name] for name in LAYOUTS]
    from vllm.platforms.cuda import _get_backend_priorities  # not before: it asks for a driver

    capability = current_platform.get_device_capability()
    ranked = _get_backend_priorities(use_mla=False, device_capability=capability)
    return [backend for backend in ranked if backend.name in LAYOUTS]


@cache
def packed_backend(base: type[AttentionBackend], fixed: bool) -> type[AttentionBackend]:
    """`base` over block-outermost KV memory, for the window caches; with `fixed`, each row attends by itself."""
    name = f"YOCOU_{base.get_name()}{'_ROW_BY_ROW' if fixed else ''}"
    layouts = LAYOUTS[base.get_name()]
    builder, implementation = base.get_builder_cls(), base.get_impl_cls()
    if base.get_name() == "CPU_ATTN":

        class Keeping(KeptViews, implementation):  # type: ignore[misc, valid-type]  # the base is known only at run time
            pass

        implementation = _name_class(Keeping, f"KeptViews{implementation.__name__}")
    if fixed:

        class FixedBuilder(RowByRow, builder):  # type: ignore[misc, valid-type]  # as above
            pass

        builder = _name_class(FixedBuilder, f"RowByRow{builder.__name__}")

    class Packed(base):  # type: ignore[misc, valid-type]  # as above
        @staticmethod
        def get_name() -> str:
            return name

        @staticmethod
        def get_builder_cls() -> type:
            return builder

        @staticmethod
        def get_impl_cls() -> type:
            return implementation

        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
            return layouts

        @classmethod
        def supports_device_cpu_query_lens_mismatch(cls) -> bool:
            return False  # row selection reads the host's query lengths

        @classmethod
        def supports_batch_invariance(cls) -> bool:
            return fixed or super().supports_batch_invariance()

    _name_class(Packed, f"{'RowByRow' if fixed else 'Packed'}{base.__name__}")
    if name not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(name, f"{__name__}.{Packed.__name__}")
        globals()[Packed.__name__] = Packed  # vLLM imports a registered backend by its path
    return Packed


@cache
def row_selecting_backend(base: type[AttentionBackend], kernels: bool, fixed: bool) -> type[AttentionBackend]:
    """`base` over block-outermost KV memory, for the global cache: its metadata covers the selected rows.

    With `kernels`, its implementation leaves the steps that they are made for to the plugin's kernels. With `fixed`,
    each row attends by itself.
    """
    packed = packed_backend(base, fixed)

    class Builder(RowSelecting, packed.get_builder_cls()):  # type: ignore[misc]  # as above
        pass

    implementation = packed.get_impl_cls()
    if kernels:
        from vllm_yocou.serving.fused_attention import CrossAttentionByKernel  # not before: it wants Triton

        class ByKernel(CrossAttentionByKernel, implementation):  # type: ignore[misc, valid-type]  # as above
            pass

        implementation = _name_class(ByKernel, f"{base.__name__}ByKernel")

    class Selecting(packed):  # type: ignore[misc, valid-type]  # as above
        @staticmethod
        def get_builder_cls() -> type:
            return Builder

        @staticmethod
        def get_impl_cls() -> type:
            return implementation

    _name_class(Builder, f"RowSelecting{packed.get_builder_cls().__name__}")
    return _name_class(Selecting, f"RowSelecting{base.__name__}")


def _name_class(made: type, name: str) -> type:
    """Name a class of a factory for what it is made of, so that logs and tracebacks tell them apart."""
    made.__name__ = made.__qualname__ = name
    return made


def smallest_block(backend: type[AttentionBackend], spec: AttentionSpec) -> int:
    """Tokens of the smallest KV block that the backend's kernels take for a cache."""
    sizes = backend.get_supported_kernel_block_sizes(spec)
    return min(size.base if isinstance(size, MultipleOf) else size for size in sizes)


class RowSelecting:
    """Mixed into a metadata builder: builds for the selected rows and records them in `RowSlots`."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]  # a builder's
        widen_decode_scratch(self, kv_cache_spec.head_size)
        (self.slots,) = row_slots(vllm_config)
        self.selector = RowSelector(vllm_config, self.slots.requests)
        self.shares_experts = share_experts(vllm_config)
        self.counters = RowCounters(vllm_config) if get_tensor_model_parallel_rank() == 0 else None
        self.serving = False  # from the first request on; steps before it warm up
        self.capturing = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec) -> AttentionCGSupport:
        # A graph of a mixed batch would be captured with all rows; those of decodes never leave any out.
        supported = super().get_cudagraph_support(vllm_config, kv_cache_spec)  # type: ignore[misc]  # a builder's
        return min(supported, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> AttentionMetadata:
        batch, rows = common_attn_metadata, int(common_attn_metadata.query_start_loc_cpu[-1])
        selected = self.selector.select(batch)
        reduced = batch  # with no row selected, no layer reads the metadata
        if selected is not None and len(selected.rows_M):
            reduced = reduce_metadata(batch, selected)
            if self.slots.map_adapters is not None:
                self.slots.map_adapters(selected.rows_M)
        metadata = super().build(common_prefix_len, reduced, fast_build)  # type: ignore[misc]  # a builder's
        run = rows if selected is None else len(selected.rows_M)
        # Only ranks that share experts take the steps of others while they are idle.
        made_up = self.shares_experts and self.selector.is_made_up(batch)
        self.slots.put(metadata, None if selected is None else self.on_device(selected), 0 if made_up else run)
        if self.counters is not None and not self.capturing and not made_up:
            self.serving = self.serving or self.selector.begins_a_request(batch)
            if self.serving:
                self.counters.count(rows, run)
        return metadata

    def on_device(self, selected: SelectedRows) -> StepRows:
        rows_M = async_tensor_h2d(selected.rows_M, device=self.device)  # type: ignore[attr-defined]  # a builder's
        return StepRows(rows_M, int(selected.queries_R.max()))

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> AttentionMetadata:
        self.capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]  # a builder's
        finally:
            self.capturing = False


def reduce_metadata(batch: CommonAttentionMetadata, selected: SelectedRows) -> CommonAttentionMetadata:
    """The batch as the cross-decoder sees it: same requests and contexts, fewer queries."""
    queries = selected.queries_R
    padding = batch.num_reqs - len(queries)
    start_cpu = torch.from_numpy(np.pad(selected.query_start_loc, (0, padding), mode="edge"))
    return batch.replace(
        query_start_loc=async_tensor_h2d(start_cpu, device=batch.query_start_loc.device),
        query_start_loc_cpu=start_cpu,
        num_actual_tokens=len(selected.rows_M),
        # FlashAttention 2 takes a longest query of one for exactly one query a request; here some may have none.
        max_query_len=max(int(queries.max()), 1 if padding == 0 and queries.all() else 2),
        positions=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
