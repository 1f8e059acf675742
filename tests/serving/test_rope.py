"""vLLM's rotary layers with our frequencies; what they compute is held to the reference in test_model.py."""

import torch
import torch.utils._device as device_mode
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_yocou.serving.rope import Yoco2024RotaryEmbedding


def test_the_table_of_the_2024_code_is_where_the_model_is(monkeypatch):
    """Seen on a GPU, after transformers had loaded a model in the same process: half of the table was on the CPU."""
    constructors = device_mode._device_constructors() - {torch.linspace}
    monkeypatch.setattr(device_mode, "_device_constructors", lambda: constructors)
    with set_current_vllm_config(VllmConfig()), torch.device("meta"):
        layer = Yoco2024RotaryEmbedding(32, 32, 64, 1e4, True, torch.float32)
    assert layer.cos_sin_cache.device.type == "meta"
