"""Rotary position embeddings of the served model: vLLM's layers over the tables of rope.py."""

import math
from functools import cache

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


# One for all layers, as vLLM keeps its own: the table of a million positions has hundreds of megabytes.
yoco2024_rotary_embedding = cache(Yoco2024RotaryEmbedding)


def rotary_embedding(vllm_config: VllmConfig, head_dim: int) -> nn.Module:
    config: YocoUConfig = vllm_config.model_config.hf_config
    positions = max(config.max_position_embeddings, vllm_config.model_config.max_model_len)
    neox, rope = not config.rope_interleaved, config.rope_parameters
    if rope["rope_type"] == "yoco2024":
        dtype = vllm_config.model_config.dtype
        return yoco2024_rotary_embedding(head_dim, head_dim, positions, rope["rope_theta"], neox, dtype)
    if rope["rope_type"] == "linear":
        positions = math.ceil(positions / rope["factor"])  # vLLM's table of this type is longer by the factor
        rope = rope | {"factor": float(rope["factor"])}  # and an int is none to vLLM
    return get_rope(head_dim, positions, is_neox_style=neox, rope_parameters=rope)
