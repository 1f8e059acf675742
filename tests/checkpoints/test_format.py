"""The table of tensors is the reference model's state dict."""

import pytest
from harness import tiny

from vllm_yocou.checkpoints.format import expected_shapes


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_table_is_the_reference_models_state_dict(name):
    cfg = tiny.CONFIGS[name]
    shapes = {key: tuple(tensor.shape) for key, tensor in tiny.model(cfg).state_dict().items()}
    if cfg.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert expected_shapes(cfg) == shapes
