"""The table of tensors is the reference model's state dict."""

import pytest
from harness import tiny

from vllm_yocou.checkpoints.format import expected_shapes

CONFIGS = tiny.CONFIGS | tiny.AUTHORS


@pytest.mark.parametrize("name", CONFIGS)
def test_table_is_the_reference_models_state_dict(name):
    cfg = CONFIGS[name]
    shapes = {key: tuple(tensor.shape) for key, tensor in tiny.model(cfg).state_dict().items()}
    if cfg.tie_word_embeddings:
        del shapes["lm_head.weight"]
    assert expected_shapes(cfg) == shapes
