"""vLLM's backends that ours are built on: names, layouts, graphs. rows/test_skipping.py tests what they compute."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_yocou.rows.selection import SelectedRows
from vllm_yocou.serving.backend import (
    LAYOUTS,
    packed_backend,
    reduce_metadata,
    row_selecting_backend,
    served_backend,
    smallest_block,
)

BLOCKS = {"CPU_ATTN": 32, "FLASH_ATTN": 16, "TRITON_ATTN": 16}


@pytest.fixture(params=LAYOUTS)
def base(request):
    return AttentionBackendEnum[request.param].get_class()


def test_registered_under_a_name_of_its_own(base):
    packed, selecting = packed_backend(base), row_selecting_backend(base)
    member = AttentionBackendEnum[f"YOCOU_{base.get_name()}"]
    assert packed.get_name() == selecting.get_name() == member.name
    assert member.get_class() is packed and issubclass(selecting, packed) and issubclass(packed, base)


def test_blocks_are_outermost_and_as_small_as_the_kernels_take(base):
    for backend in (packed_backend(base), row_selecting_backend(base)):
        assert all(layout.is_block_outermost for layout in backend.supported_kv_cache_layouts())
        assert smallest_block(backend) == BLOCKS[base.get_name()]


def test_only_the_global_cache_has_another_builder_and_its_graphs_hold_decodes(base):
    packed, selecting = packed_backend(base).get_builder_cls(), row_selecting_backend(base).get_builder_cls()
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


def test_another_backend_is_refused_if_chosen_and_replaced_if_not():
    with pytest.raises(
        ValueError, match=r"FLEX_ATTENTION cannot be used with YOCO-U: .* CPU_ATTN, FLASH_ATTN, TRITON_ATTN"
    ):
        served_backend(FlexAttentionBackend, chosen_by_user=True)
    assert served_backend(FlexAttentionBackend, chosen_by_user=False).get_name() == "TRITON_ATTN"


@pytest.mark.parametrize("cache_dtype", ["fp8_per_token_head", "int8_per_token_head"])
def test_a_cache_dtype_that_the_kernels_do_not_read_is_refused(cache_dtype):
    cpu = AttentionBackendEnum.CPU_ATTN.get_class()
    with pytest.raises(ValueError, match=f"--kv-cache-dtype {cache_dtype} cannot be used .* CPU_ATTN: .* fp8_e5m2"):
        served_backend(cpu, chosen_by_user=False, cache_dtype=cache_dtype)
    assert served_backend(cpu, chosen_by_user=False, cache_dtype="fp8") is cpu


def test_other_models_see_none_of_it():
    """vLLM's own backends are what they were after ours have been built on them."""
    program = """
from vllm.v1.attention.backends.registry import AttentionBackendEnum
base = AttentionBackendEnum.CPU_ATTN.get_class()
before = dict(vars(base)), base.supported_kv_cache_layouts(), base.get_builder_cls()
import vllm_yocou.serving.backend
vllm_yocou.serving.backend.row_selecting_backend(base)
assert before == (dict(vars(base)), base.supported_kv_cache_layouts(), base.get_builder_cls())
assert AttentionBackendEnum.CPU_ATTN.get_class() is base and base.get_name() == "CPU_ATTN"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
