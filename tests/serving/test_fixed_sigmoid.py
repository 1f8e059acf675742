"""What a sigmoid gives a number does not depend on where in a tensor it stands, nor on the threads that compute it."""

import pytest
import torch
from torch.nn import functional as F

from vllm_yocou.serving.fixed_sigmoid import FixedSiluAndMul, sigmoid, silu


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("function", [sigmoid, silu])
@pytest.mark.parametrize("shape", [(1000, 8), (1000, 1), (333, 1376)], ids=str)
def test_bits_do_not_depend_on_the_place(function, shape, threads):
    """torch's own of (1000, 8) give some 300 numbers other bits."""
    x = 4 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(function(x), torch.cat([function(row[None]) for row in x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_torchs(dtype):
    x = torch.linspace(-30, 30, 999).to(dtype)
    for ours, torchs in ((sigmoid, torch.sigmoid), (silu, F.silu)):
        torch.testing.assert_close(ours(x), torchs(x), rtol=torch.finfo(dtype).eps, atol=1e-9)
    gates, ups = x.view(3, -1), x.flip(0).view(3, -1)
    joined = torch.cat([gates, ups], -1)
    torch.testing.assert_close(FixedSiluAndMul(None)(joined), F.silu(gates) * ups)
    torch.testing.assert_close(FixedSiluAndMul(7.0)(joined), F.silu(gates.clamp(max=7)) * ups.clamp(-7, 7))
