"""vLLM's attention kernels over block-outermost KV memory, and with fewer queries than keys where rows skip.

Each of these backends is one of vLLM's own under a name of its own. Two answers change what is computed: the KV layouts
it asks for, in which the packed caches of a block lie side by side, and, for the global cache, the metadata builder,
which leaves out the rows that the row selection leaves out.
"""

from functools import cache

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.cache import CacheDType
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_yocou.rows.hand_over import StepRows, row_slots
from vllm_yocou.rows.metrics import RowCounters
from vllm_yocou.rows.selection import RowSelector, SelectedRows
from vllm_yocou.workarounds import check_cache_dtype, widen_decode_scratch

# vLLM's backends that this plugin builds on, and the KV layouts in which it runs them. The CPU's kernel reads
# head-major pages and takes the stride between blocks from the tensor; CUDA's take any layout.
LAYOUTS = {
    "CPU_ATTN": (KVCacheLayout.BLHNC,),
    "FLASH_ATTN": (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC),
    "TRITON_ATTN": (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC),
}


def served_backend(
    selected: type[AttentionBackend], chosen_by_user: bool, cache_dtype: CacheDType = "auto"
) -> type[AttentionBackend]:
    """vLLM's selected backend, or Triton's if the plugin does not support it.

    Raises:
        ValueError: if the user chose one that cannot, or if its kernels do not read caches of this dtype.
    """
    base = selected
    if selected.get_name() not in LAYOUTS:
        if chosen_by_user:
            raise ValueError(
                f"the attention backend {selected.get_name()} cannot be used with YOCO-U: the plugin packs KV caches "
                f"for {', '.join(LAYOUTS)} only, choose one of these."
            )
        base = AttentionBackendEnum.TRITON_ATTN.get_class()
    check_cache_dtype(base, cache_dtype)
    return base


@cache
def packed_backend(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """`base` over block-outermost KV memory, for the window caches."""
    name = f"YOCOU_{base.get_name()}"
    layouts = LAYOUTS[base.get_name()]

    class Packed(base):  # type: ignore[misc, valid-type]  # the base is known only at run time
        @staticmethod
        def get_name() -> str:
            return name

        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
            return layouts

        @classmethod
        def supports_device_cpu_query_lens_mismatch(cls) -> bool:
            return False  # row selection reads the host's query lengths

    _name_class(Packed, f"Packed{base.__name__}")
    if name not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(name, f"{__name__}.{Packed.__name__}")
        globals()[Packed.__name__] = Packed  # vLLM imports a registered backend by its path
    return Packed


@cache
def row_selecting_backend(base: type[AttentionBackend], kernels: bool = False) -> type[AttentionBackend]:
    """`base` over block-outermost KV memory, for the global cache: its metadata covers the selected rows.

    With `kernels`, its implementation leaves the steps that they are made for to the plugin's kernels.
    """
    packed = packed_backend(base)

    class Builder(RowSelecting, packed.get_builder_cls()):  # type: ignore[misc]  # as above
        pass

    implementation = base.get_impl_cls()
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


def smallest_block(backend: type[AttentionBackend]) -> int:
    """Tokens of the smallest KV block that the backend's kernels take."""
    sizes = backend.get_supported_kernel_block_sizes()
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
        self.counters = RowCounters(vllm_config) if get_tensor_model_parallel_rank() == 0 else None
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
        # With no row selected, no layer reads the metadata.
        reduced = reduce_metadata(batch, selected) if selected is not None and len(selected.rows_M) else batch
        metadata = super().build(common_prefix_len, reduced, fast_build)  # type: ignore[misc]  # a builder's
        self.slots.put(metadata, None if selected is None else self.on_device(selected))
        if self.counters is not None and not self.capturing:
            self.counters.count(rows, rows if selected is None else len(selected.rows_M))
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
