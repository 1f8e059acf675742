"""vLLM's backends that ours are built on: names, layouts, graphs. rows/test_skipping.py tests what they compute."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from vllm import envs
from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_yocou.rows.selection import SelectedRows
from vllm_yocou.serving import backend as module
from vllm_yocou.serving.backend import (
    LAYOUTS,
    packed_backend,
    reduce_metadata,
    row_selecting_backend,
    smallest_block,
)
from vllm_yocou.serving.batch_invariance import check_batch_invariance

HEADS_OF_64 = FullAttentionSpec(block_size=1, num_kv_heads=1, head_size=64, dtype=torch.float32)
BLOCKS = {"CPU_ATTN": 32, "FLASH_ATTN": 16, "TRITON_ATTN": 16}


@pytest.fixture(params=LAYOUTS)
def base(request):
    return AttentionBackendEnum[request.param].get_class()


def test_registered_under_a_name_of_its_own(base):
    packed, selecting = packed_backend(base, False), row_selecting_backend(base, False, False)
    member = AttentionBackendEnum[f"YOCOU_{base.get_name()}"]
    assert packed.get_name() == selecting.get_name() == member.name
    assert member.get_class() is packed and issubclass(selecting, packed) and issubclass(packed, base)


def test_blocks_are_outermost_and_as_small_as_the_kernels_take(base):
    for backend in (packed_backend(base, False), row_selecting_backend(base, False, False)):
        assert all(layout.is_block_outermost for layout in backend.supported_kv_cache_layouts())
        assert smallest_block(backend, HEADS_OF_64) == BLOCKS[base.get_name()]


def test_only_the_global_cache_has_another_builder_and_its_graphs_hold_decodes(base):
    packed, selecting = (
        packed_backend(base, False).get_builder_cls(),
        row_selecting_backend(base, False, False).get_builder_cls(),
    )
    assert packed is base.get_builder_cls() and issubclass(selecting, packed)
    supported = selecting.get_cudagraph_support(None, None)
    mixed_too = packed.get_cudagraph_support(None, None) is AttentionCGSupport.ALWAYS
    assert supported is (AttentionCGSupport.UNIFORM_BATCH if mixed_too else packed._cudagraph_support)


def batch(lengths: list[int], contexts: list[int], padding: int = 0) -> CommonAttentionMetadata:
    start = torch.tensor([0, *np.cumsum(lengths), *[sum(lengths)] * padding], dtype=torch.int32)
    requests = len(lengths) + padding
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor([*contexts, *[0] * padding], dtype=torch.int32),
        num_reqs=requests,
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=max(contexts),
        block_table_tensor=torch.zeros(requests, 4, dtype=torch.int32),
        slot_mapping=torch.arange(sum(lengths)),
    )


@pytest.mark.parametrize(
    "selected, padding, longest",
    [([1, 1, 1], 0, 1), ([1, 0, 1], 0, 2), ([1, 1, 1], 2, 2), ([1, 0, 30], 0, 30), ([4, 1, 1], 1, 4)],
)
def test_a_longest_query_of_one_means_one_query_a_request(selected, padding, longest):
    """FlashAttention 2 relies on it: it then reads queries by request and not by where each begins."""
    whole = batch([30, 30, 30], [30, 60, 90], padding)
    starts = np.array([0, *np.cumsum(selected)], dtype=np.int32)
    reduced = reduce_metadata(whole, SelectedRows(np.arange(sum(selected)), starts))
    assert reduced.max_query_len == longest and reduced.num_actual_tokens == sum(selected)
    assert reduced.query_start_loc.tolist() == [*starts, *[sum(selected)] * padding]
    assert reduced.num_reqs == whole.num_reqs and reduced.seq_lens is whole.seq_lens


class FlashInfer(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "FLASHINFER"


@pytest.fixture
def selected(monkeypatch):
    """The name of the backend that is served where vLLM selects the first of `accepting`; by default, as here."""

    def of(cache_dtype: str = "auto", accepting: tuple[str, ...] | None = None, **attention) -> type:
        vllm_config = VllmConfig(attention_config=AttentionConfig(**attention))
        vllm_config.cache_config.cache_dtype = cache_dtype

        def select(head_size, dtype, cache_dtype, has_sliding_window):
            asked = vllm_config.attention_config.backend
            valid = accepting if asked is None else [name for name in accepting if name == asked.name]
            if not valid:
                raise ValueError(f"Selected backend {asked} is not valid")
            # FlashInfer's own class needs its library; only its name is asked for.
            return AttentionBackendEnum[valid[0]].get_class() if valid[0] != "FLASHINFER" else FlashInfer

        if accepting is not None:
            monkeypatch.setattr(module, "get_attn_backend", select)
        with set_current_vllm_config(vllm_config):
            chosen = module.served_backend(vllm_config, 64, windowed=True)
        assert vllm_config.attention_config.backend == attention.get("backend")
        return chosen.get_name()

    return of


@pytest.mark.parametrize(
    "accepting, taken",
    [
        (("FLASH_ATTN", "TRITON_ATTN"), "FLASH_ATTN"),
        (("FLASHINFER", "FLASH_ATTN", "TRITON_ATTN"), "FLASH_ATTN"),  # Blackwell
        (("FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION"), "TRITON_ATTN"),  # where FlashAttention does not accept
        (("FLEX_ATTENTION", "TRITON_ATTN"), "TRITON_ATTN"),
    ],
)
def test_vllms_next_backend_is_taken(accepting, taken, selected, cuda, monkeypatch):
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: DeviceCapability(10, 0))
    assert selected(accepting=accepting) == taken


def test_flash_attention_is_passed_over_for_invariant_batches(selected, cuda, monkeypatch):
    """Of FlashAttention 3 with one split, rows in a window moved with the edges of chunks, on a GPU."""
    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: DeviceCapability(9, 0))
    monkeypatch.setitem(vars(envs), "VLLM_BATCH_INVARIANT", True)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert selected(accepting=("FLASH_ATTN", "TRITON_ATTN")) == "TRITON_ATTN"
    with pytest.raises(ValueError, match=r"FLASH_ATTN cannot be used with VLLM_BATCH_INVARIANT=1: .* TRITON_ATTN"):
        selected(accepting=("FLASH_ATTN", "TRITON_ATTN"), backend=AttentionBackendEnum.FLASH_ATTN)
    with pytest.raises(ValueError, match="FLASH_ATTN cannot be used with VLLM_BATCH_INVARIANT=1"):
        check_batch_invariance(VllmConfig(attention_config=AttentionConfig(backend=AttentionBackendEnum.FLASH_ATTN)))


def test_pages_of_a_fixed_size_are_passed_over(selected, monkeypatch):
    """As FlashAttention 4's kernel for heads of 256 wants them: packing makes the global page a multiple."""
    flash = AttentionBackendEnum.FLASH_ATTN.get_class()
    monkeypatch.setattr(flash, "get_supported_kernel_block_sizes", lambda spec: [128] if spec.head_size == 64 else [])
    assert selected(accepting=("FLASH_ATTN", "TRITON_ATTN")) == "TRITON_ATTN"
    with pytest.raises(ValueError, match=r"FLASH_ATTN cannot be used with YOCO-U: .* pages of any multiple"):
        selected(accepting=("FLASH_ATTN", "TRITON_ATTN"), backend=AttentionBackendEnum.FLASH_ATTN)


@pytest.mark.parametrize(
    "chosen",
    [dict(backend=AttentionBackendEnum.FLEX_ATTENTION), dict(backend_per_kind={"sliding_window": "FLEX_ATTENTION"})],
)
def test_another_backend_is_refused_if_chosen(chosen, selected):
    with pytest.raises(
        ValueError, match=r"FLEX_ATTENTION cannot be used with YOCO-U: .* CPU_ATTN, FLASH_ATTN, TRITON_ATTN"
    ):
        selected(accepting=("FLEX_ATTENTION", "TRITON_ATTN"), **chosen)


def test_a_machine_with_none_that_the_plugin_builds_on_is_refused(selected):
    with pytest.raises(ValueError, match=r"FLEX_ATTENTION cannot be used with YOCO-U: .* choose one of these"):
        selected(accepting=("FLEX_ATTENTION",))


@pytest.mark.parametrize("cache_dtype", ["fp8_per_token_head", "int8_per_token_head"])
def test_scales_of_each_token_are_refused(cache_dtype, selected):
    with pytest.raises(ValueError, match=f"--kv-cache-dtype {cache_dtype} cannot be used with YOCO-U: .* use fp8"):
        selected(cache_dtype)


def test_a_cache_dtype_that_the_kernels_do_not_read_is_refused(selected):
    with pytest.raises(ValueError, match=r"--kv-cache-dtype nvfp4 cannot be used .* CPU_ATTN: .* fp8_e5m2"):
        selected("nvfp4", accepting=("CPU_ATTN",))
    assert selected("fp8", accepting=("CPU_ATTN",)) == "CPU_ATTN"


def test_other_models_see_none_of_it():
    """vLLM's own backends are what they were after ours have been built on them."""
    program = """
from vllm.v1.attention.backends.registry import AttentionBackendEnum
base = AttentionBackendEnum.CPU_ATTN.get_class()
before = dict(vars(base)), base.supported_kv_cache_layouts(), base.get_builder_cls()
import vllm_yocou.serving.backend
vllm_yocou.serving.backend.row_selecting_backend(base, False, False)
assert before == (dict(vars(base)), base.supported_kv_cache_layouts(), base.get_builder_cls())
assert AttentionBackendEnum.CPU_ATTN.get_class() is base and base.get_name() == "CPU_ATTN"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
