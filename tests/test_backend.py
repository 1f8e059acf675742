"""The backends of vLLM's that ours are built on: names, layouts, graphs. What they compute is test_row_skipping's."""

import subprocess
import sys

import pytest
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_yocou.backend import LAYOUTS, packed_backend, row_selecting_backend, served_backend, smallest_block

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
    assert supported.value <= min(
        packed.get_cudagraph_support(None, None).value, AttentionCGSupport.UNIFORM_BATCH.value
    )


def test_another_backend_is_refused_if_chosen_and_replaced_if_not():
    with pytest.raises(
        ValueError, match="FLEX_ATTENTION cannot be used with YOCO-U: .* CPU_ATTN, FLASH_ATTN, TRITON_ATTN"
    ):
        served_backend(FlexAttentionBackend, chosen_by_user=True)
    assert served_backend(FlexAttentionBackend, chosen_by_user=False).get_name() == "TRITON_ATTN"


def test_other_models_see_none_of_it():
    """vLLM's own backends are what they were after ours have been built on them."""
    program = """
from vllm.v1.attention.backends.registry import AttentionBackendEnum
base = AttentionBackendEnum.CPU_ATTN.get_class()
before = dict(vars(base)), base.supported_kv_cache_layouts(), base.get_builder_cls()
import vllm_yocou.backend
vllm_yocou.backend.row_selecting_backend(base)
assert before == (dict(vars(base)), base.supported_kv_cache_layouts(), base.get_builder_cls())
assert AttentionBackendEnum.CPU_ATTN.get_class() is base and base.get_name() == "CPU_ATTN"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
