"""vLLM's Triton decode kernel stays inside of the scratch that it is given, whose width is ours (workarounds.py)."""

from types import SimpleNamespace

import pytest
import torch
from harness import paged
from vllm.v1.attention.backends.triton_attn import NUM_PAR_SOFTMAX_SEGMENTS
from vllm.v1.attention.ops.triton_unified_attention import unified_attention

from vllm_yocou.kernels import naive
from vllm_yocou.workarounds import widen_decode_scratch

REQUESTS, HEADS, KV_HEADS, SLOTS = 5, 2, 1, 16
CANARY, CANARIES = 12345.0, 1 << 16  # more than the fault reaches, which would end the process


def decode(of_model: int, of_layer: int, widened: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """One row for each request over a layer's heads, where the model's are of `of_model`.

    Returns:
        The rows that vLLM computes, those expected, and how many of the numbers behind the scratch it has changed.
    """
    torch.manual_seed(of_layer)
    batch, _ = paged.batch([(37, 1)] * REQUESTS, 4, SLOTS)
    key, value = paged.caches(4 * REQUESTS, SLOTS, KV_HEADS, of_layer, torch.float32)
    q_NHd = torch.randn(REQUESTS, HEADS, of_layer)
    # As vLLM's builder makes it, for as many rows as it lets this kernel take.
    builder = SimpleNamespace(softmax_segm_output=torch.empty(REQUESTS, HEADS, NUM_PAR_SOFTMAX_SEGMENTS, of_model))
    if widened:
        widen_decode_scratch(builder, of_layer)
    shape = builder.softmax_segm_output.shape
    memory = torch.full([shape.numel() + CANARIES], CANARY)
    scales = torch.ones(REQUESTS, KV_HEADS)
    out_NHd = torch.empty_like(q_NHd)
    unified_attention(
        q=q_NHd,
        k=key,
        v=value,
        out=out_NHd,
        cu_seqlens_q=batch.starts_R1,
        max_seqlen_q=1,
        seqused_k=batch.lengths_R,
        max_seqlen_k=64,
        softmax_scale=of_layer**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=batch.block_table_RX,
        softcap=0,
        q_descale=None,
        k_descale=scales,
        v_descale=scales,
        seq_threshold_3D=REQUESTS,
        num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
        softmax_segm_output=memory[: shape.numel()].view(shape),
        softmax_segm_max=torch.empty(shape[:3]),
        softmax_segm_expsum=torch.empty(shape[:3]),
    )
    expected = naive.cross_attention(q_NHd.double(), key.double(), value.double(), batch, of_layer**-0.5)
    return out_NHd, expected, int((memory[shape.numel() :] != CANARY).sum())


@pytest.mark.parametrize("of_model, of_layer", [(32, 32), (32, 64), (64, 32), (32, 80)])
def test_nothing_behind_the_scratch_is_written(of_model, of_layer):
    got, expected, changed = decode(of_model, of_layer, widened=True)
    assert changed == 0
    paged.close(got, expected)


def test_what_vllm_allocates_by_itself_is_overrun():
    """The fault that the workaround is for: heads of 64 in a model of heads of 32."""
    _, _, changed = decode(32, 64, widened=False)
    assert changed > 0
