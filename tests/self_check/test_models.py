"""The models that the check serves: tiny ones that differ in what matters, and checkpoints that fit into memory."""

import pytest
import torch
from harness import tiny
from vllm import envs

from vllm_yocou.self_check import models


def test_the_reference_stays_off_a_gpu_whose_products_vllm_replaces(monkeypatch):
    assert models.reference_device("cuda") == "cuda" and models.needed_bytes(3, 2, "cuda") == {"cuda": 3 * 12}
    monkeypatch.setitem(vars(envs), "VLLM_BATCH_INVARIANT", True)
    assert models.reference_device("cuda") == "cpu" and models.needed_bytes(3, 2, "cuda") == {"cuda": 6, "cpu": 30}


def test_the_tiny_models_switch_what_differs():
    with models.tiny_models() as written:
        configs = [model.config for model in written]
        weights = written[0].reference(torch.float32, "cpu").state_dict()
        again = written[0].reference(torch.bfloat16, "cpu")
    assert [config.num_iterations for config in configs] == [3, 1, 3]
    assert [config.cross_decoder_rope for config in configs] == [True, False, False]
    assert [config.is_moe for config in configs] == [False, False, True]
    assert configs[0].qk_norm == "all"
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.lm_head.weight, weights["lm_head.weight"].bfloat16())
    for config in configs:
        config.check_ranks(8)


@pytest.fixture
def folder(tmp_path):
    tiny.model(tiny.config()).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_checkpoint_that_does_not_fit_is_refused_with_both_sizes(folder, monkeypatch):
    # Served and reference in bfloat16 and a reference in float64 are 12 bytes a parameter: 1.2 of 1 GiB.
    monkeypatch.setattr(models, "available_bytes", lambda device: 1 << 30)
    parameters = (1 << 30) // 10
    assert models.checkpoint(folder, parameters // 2, "bfloat16", "cpu").context == 1024
    with pytest.raises(ValueError, match=r"needs 1\.2 GiB .* and 1\.0 GiB are available"):
        models.checkpoint(folder, parameters, "bfloat16", "cpu")


def test_this_machines_memory():
    assert 1 << 20 < models.available_bytes("cpu") < 1 << 50
