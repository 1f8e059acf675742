"""What the kernels' table times side by side computes the same; on a CPU, what Triton's interpreter runs of it."""

import pytest
import torch


@pytest.fixture(autouse=True)
def a_gpu_to_vllm(monkeypatch):
    if not torch.cuda.is_available():
        # Asked for by vLLM's cache writer, to choose a block.
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))


@pytest.mark.parametrize(
    "kind, context",
    [
        ("global_writes", 70),
        *(
            pytest.param(kind, context, marks=pytest.mark.slow)
            for kind, context in (("cross_attentions", 530), ("window_steps", 70), ("window_steps", 530))
        ),
    ],
)
def test_contestants_agree(kind, context):
    from benchmarks import kernels

    contestants = getattr(kernels, kind)(2, context, torch.float32)
    expected = contestants.pop("ours")().clone()
    assert contestants
    for contestant in contestants.values():
        torch.testing.assert_close(contestant(), expected, atol=3e-5, rtol=3e-5)
