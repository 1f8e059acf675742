"""Routed experts clamp or the start is refused: what vLLM's kernels do with `swiglu_limit` is a list of their names."""

from types import SimpleNamespace

import pytest
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from vllm_yocou.serving.expert_kernels import CLAMPING, check_clamp


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
