"""The loop over a rank's experts on a CPU is their definition."""

import pytest
import torch

from vllm_yocou.serving.looped_experts import looped_experts


@pytest.mark.parametrize("fixed", [False, True], ids=["", "batch-invariant"])
@pytest.mark.parametrize("limit", [0.5, None])
@pytest.mark.parametrize("own", [None, [-1, 1, -1, 0, 2, -1]], ids=["all-own", "some-own"])
def test_against_one_row_at_a_time(own, limit, fixed):
    """In float64; one of this rank's experts is chosen by nobody."""
    torch.manual_seed(0)
    N, X, E, F, k = 9, 8, 5, 6, 2
    x_NX, gate_up_EFX, down_EXF = torch.randn(N, X), torch.randn(E, 2 * F, X), torch.randn(E, X, F)
    weights_Nk, chosen_Nk = torch.rand(N, k), torch.stack([torch.randperm(E - 1)[:k] for _ in range(N)])
    places = list(range(E)) if own is None else own
    out_NX, own = torch.empty(N, X), None if own is None else torch.tensor(own, dtype=torch.int32)
    looped_experts(out_NX, x_NX, gate_up_EFX, down_EXF, weights_Nk, chosen_Nk, own, limit, fixed)
    for row in range(N):
        expected = torch.zeros(X, dtype=torch.float64)
        for slot, chosen in enumerate(chosen_Nk[row]):
            if (expert := places[chosen]) < 0:
                continue
            products = gate_up_EFX[expert].double() @ x_NX[row].double()
            gates, ups = products[:F], products[F:]
            if limit is not None:
                assert (gates < -limit).any()  # what a lower bound of the gates would change
                gates, ups = gates.clamp(max=limit), ups.clamp(-limit, limit)
            h = gates / (1 + torch.exp(-gates)) * ups
            expected += weights_Nk[row, slot].double() * (down_EXF[expert].double() @ h)
        torch.testing.assert_close(out_NX[row].double(), expected, atol=1e-5, rtol=0)
