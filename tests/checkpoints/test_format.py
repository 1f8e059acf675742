"""The table of tensors is the reference model's state dict."""

import pytest
from harness import tiny

from vllm_yocou.checkpoints.format import expected_shapes, undecided_shapes

CONFIGS = tiny.CONFIGS | tiny.AUTHORS


@pytest.mark.parametrize("name", CONFIGS)
def test_table_is_the_reference_models_state_dict(name):
    cfg = CONFIGS[name]
    shapes = {key: tuple(tensor.shape) for key, tensor in tiny.model(cfg).state_dict().items()}
    if cfg.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert expected_shapes(cfg) == shapes


def test_gates_are_undecided_where_the_config_leaves_them_to_the_weights():
    open_, gated = tiny.moe_config(), tiny.moe_config(shared_expert_gate=True)
    assert expected_shapes(open_) | undecided_shapes(open_) == expected_shapes(gated)
    assert not expected_shapes(open_).keys() & undecided_shapes(open_).keys()
    for decided in (gated, tiny.moe_config(shared_expert_gate=False), tiny.config()):
        assert undecided_shapes(decided) == {}
