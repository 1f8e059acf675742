"""Rotary position embeddings of the served model: vLLM's layers over the tables of rope.py."""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from vllm_yocou.config import YocoUConfig
from vllm_yocou.rope import inverse_frequencies


class Yoco2024RotaryEmbedding(RotaryEmbedding):
    """vLLM's rotary embedding over the frequency table of the 2024 YOCO code."""

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        return inverse_frequencies(self.rotary_dim, {"rope_type": "yoco2024", "rope_theta": base}, torch.float)


def rotary_embedding(vllm_config: VllmConfig, head_dim: int) -> nn.Module:
    config: YocoUConfig = vllm_config.model_config.hf_config
    positions = max(config.max_position_embeddings, vllm_config.model_config.max_model_len)
    neox = not config.rope_interleaved
    if config.rope_parameters["rope_type"] == "yoco2024":
        theta, dtype = config.rope_parameters["rope_theta"], vllm_config.model_config.dtype
        return Yoco2024RotaryEmbedding(head_dim, head_dim, positions, theta, neox, dtype)
    return get_rope(head_dim, positions, is_neox_style=neox, rope_parameters=config.rope_parameters)
