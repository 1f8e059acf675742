"""Routed experts clamp or the start is refused: what vLLM's kernels do with `swiglu_limit` is a list of their names."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from vllm_yocou.serving.clamped_experts import CLAMPING, check_clamp
from vllm_yocou.serving.looped_experts import clamped_experts


def check(monkeypatch, experts: str | None, quantized: bool, cpu: bool = False) -> None:
    """Of a layer for which vLLM has chosen experts of this name; they stay as they are."""
    kind = SimpleNamespace if quantized else UnquantizedFusedMoEMethod
    method = kind.__new__(kind)
    method.__dict__["experts_cls"] = experts and type(experts, (), {})
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    moe_config = SimpleNamespace(swiglu_limit=10.0)
    check_clamp(SimpleNamespace(routed_experts=SimpleNamespace(quant_method=method), moe_config=moe_config))


@pytest.mark.parametrize("quantized", [False, True])
def test_kernels_that_clamp_are_kept(quantized, monkeypatch):
    for name in CLAMPING:
        check(monkeypatch, name, quantized)


@pytest.mark.parametrize(
    "experts, quantized, cpu, sentence",
    [
        ("TrtLlmBf16ExpertsMonolithic", False, False, "vLLM's TrtLlmBf16ExpertsMonolithic: .* --moe-backend triton"),
        ("FlashInferExperts", False, False, "vLLM's FlashInferExperts: .* use --moe-backend triton"),
        ("TrtLlmBf16LoRAExperts", False, False, "vLLM's TrtLlmBf16LoRAExperts: .* leave out --enable-lora"),
        ("FlashInferExperts", True, False, "vLLM's FlashInferExperts: .* triton or .* whose experts are not quantized"),
        ("CPUExpertsInt8", True, True, "vLLM's CPUExpertsInt8: .* whose experts are not quantized"),
        (None, True, False, "vLLM's SimpleNamespace: "),
    ],
)
def test_kernels_that_may_not_are_refused(experts, quantized, cpu, sentence, monkeypatch):
    with pytest.raises(ValueError, match=rf"^swiglu_limit 10.0 cannot be used with {sentence}"):
        check(monkeypatch, experts, quantized, cpu)


def test_the_loop_is_the_definition():
    """Row by row in float64; one of the experts is chosen by nobody."""
    torch.manual_seed(0)
    N, X, E, F, k, limit = 9, 8, 5, 6, 2, 0.5
    x_NX, gate_up_EFX, down_EXF = torch.randn(N, X), torch.randn(E, 2 * F, X), torch.randn(E, X, F)
    weights_Nk, chosen_Nk = torch.rand(N, k), torch.stack([torch.randperm(E - 1)[:k] for _ in range(N)])
    out_NX = torch.empty(N, X)
    clamped_experts(out_NX, x_NX, gate_up_EFX, down_EXF, weights_Nk, chosen_Nk, limit)
    for row in range(N):
        expected = torch.zeros(X, dtype=torch.float64)
        for slot, expert in enumerate(chosen_Nk[row]):
            products = gate_up_EFX[expert].double() @ x_NX[row].double()
            gates, ups = products[:F].clamp(max=limit), products[F:].clamp(-limit, limit)
            assert (products[:F] < -limit).any()  # what a lower bound of the gates would change
            h = gates / (1 + torch.exp(-gates)) * ups
            expected += weights_Nk[row, slot].double() * (down_EXF[expert].double() @ h)
        torch.testing.assert_close(out_NX[row].double(), expected, atol=1e-5, rtol=0)
