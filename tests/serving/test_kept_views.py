"""Attention on a CPU over views that are made once: vLLM's own is the oracle, bit for bit."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadata

from vllm_yocou.serving.backend import packed_backend, row_selecting_backend
from vllm_yocou.serving.caches import GlobalCache

HEADS, KV_HEADS, SIZE, BLOCK, WINDOW = 4, 2, 64, 32, 40
ROWS, CONTEXT = 5, 70


def implementations(cache_dtype: str) -> list:
    """vLLM's, and the two caches' own."""
    backends = [CPUAttentionBackend, packed_backend(CPUAttentionBackend, False)]
    backends.append(row_selecting_backend(CPUAttentionBackend, False, False))
    config = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.float32)
    with set_current_vllm_config(config):
        return [
            backend.get_impl_cls()(HEADS, SIZE, SIZE**-0.5, KV_HEADS, None, WINDOW, cache_dtype) for backend in backends
        ]


def metadata(cache_dtype: str) -> CPUAttentionMetadata:
    from vllm import _custom_ops as ops

    start, lengths = torch.tensor([0, ROWS], dtype=torch.int32), torch.tensor([CONTEXT], dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=SIZE,
        seq_lens=lengths,
        dtype=torch.float32,
        query_start_loc=start,
        causal=True,
        sliding_window_size=WINDOW,
        isa="vec",
        enable_kv_split=True,
        kv_cache_dtype=cache_dtype,
    )
    slots = torch.arange(CONTEXT - ROWS, CONTEXT)
    table = torch.arange(4, dtype=torch.int32)[None]
    return CPUAttentionMetadata(ROWS, ROWS, start, CONTEXT, lengths, table, slots, plan)


def one_of_a_block(dtype: torch.dtype) -> torch.Tensor:
    """Memory as the plugin's caches have it: blocks lie apart, since other caches are in between."""
    return torch.randn(4, 3, KV_HEADS, BLOCK, 2 * SIZE).to(dtype)[:, 1]


FP8 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM reads FP8 caches with AVX-512 alone")


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("cache_dtype", ["auto", pytest.param("fp8", marks=FP8)])
def test_writes_and_attends_as_vllm(padding, cache_dtype):
    torch.manual_seed(0)
    q_NHd = torch.randn(ROWS + padding, HEADS, SIZE)
    k_NKd, v_NKd = torch.randn(2, ROWS + padding, KV_HEADS, SIZE)
    before = one_of_a_block(torch.float32 if cache_dtype == "auto" else torch.float8_e4m3fn)
    if cache_dtype == "fp8":
        before = before.view(torch.uint8)
    step = metadata(cache_dtype)
    caches, outputs = [], []
    for implementation in implementations(cache_dtype):
        layer = GlobalCache.__new__(GlobalCache)
        torch.nn.Module.__init__(layer)
        layer.isa, layer._k_scale_float, layer._v_scale_float = "vec", 0.5, 2.0
        layer.kv_cache = torch.empty_strided(before.shape, before.stride(), dtype=before.dtype).copy_(before)
        out_NHd = torch.full_like(q_NHd, 7.0)
        slots = torch.cat([step.slot_mapping, torch.full((padding,), -1)])
        implementation.do_kv_cache_update(layer, k_NKd, v_NKd, layer.kv_cache, slots)
        implementation.forward(layer, q_NHd, k_NKd, v_NKd, layer.kv_cache, step, output=out_NHd)
        caches.append(layer.kv_cache)
        outputs.append(out_NHd)
    assert not caches[0].equal(before) and not outputs[0][:ROWS].eq(7.0).any()
    for cache, out_NHd in zip(caches[1:], outputs[1:], strict=True):
        assert cache.equal(caches[0]) and out_NHd.equal(outputs[0])
    assert outputs[0][ROWS:].eq(7.0).all()


def test_views_are_those_of_the_memory_that_the_cache_has():
    """vLLM gives other memory after a sleep, and takes it back at the end: nothing may hold on to it."""
    layer = GlobalCache.__new__(GlobalCache)
    torch.nn.Module.__init__(layer)
    for fill in (1.0, 2.0):
        layer.kv_cache = torch.full((1, KV_HEADS, BLOCK, 2 * SIZE), fill)
        keys, values = layer.views
        assert (
            keys.shape == values.shape == (1, KV_HEADS, BLOCK, SIZE) and keys.eq(fill).all() and values.eq(fill).all()
        )
        assert layer.views[0] is keys
    held = weakref.ref(layer.kv_cache.untyped_storage())
    del keys, values
    layer.kv_cache = torch.tensor([])
    assert held() is None
