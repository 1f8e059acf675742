"""Which of vLLM's layers computes each RoPE type of the served model; rope.py defines the types."""

import math
from functools import cache
from typing import cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import current_platform

from vllm_yocou.config import YocoUConfig
from vllm_yocou.rope import inverse_frequencies
from vllm_yocou.workarounds import as_float_factor


class Yoco2024RotaryEmbedding(RotaryEmbedding):
    """vLLM's rotary embedding with the frequencies of the 2024 YOCO code."""

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        # By name: `with torch.device(...)`, in which vLLM builds models, misses torch.linspace where transformers has
        # loaded a model in this process before, since it replaces that function while torch lists what takes a device.
        device = torch.get_default_device()
        return inverse_frequencies(self.rotary_dim, {"rope_type": "yoco2024", "rope_theta": base}, torch.float, device)


# One layer is shared by all callers, like vLLM's own: a table of a million positions takes hundreds of megabytes.
yoco2024_rotary_embedding = cache(Yoco2024RotaryEmbedding)


class WideRotation(nn.Module):
    """A rotary embedding whose table and arithmetic are float32 whatever the model's dtype, and which rounds once.

    That is what the reference model does. With a table in bfloat16 half as many more tokens of a mixture get other
    experts than there.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(
        self, positions_N: torch.Tensor, q_NX: torch.Tensor, k_NX: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        q, k = self.layer(positions_N, q_NX.float(), None if k_NX is None else k_NX.float())
        return q.to(q_NX.dtype), None if k_NX is None else k.to(k_NX.dtype)


def rotary_embedding(vllm_config: VllmConfig, head_dim: int) -> nn.Module:
    """The layer that rotates q and k (N, heads * head_dim) by the config's RoPE settings, at any position of the model.

    It is called with positions (N,), q and k; k may be None.
    """
    config = cast(YocoUConfig, vllm_config.model_config.hf_config)
    positions = max(config.max_position_embeddings, vllm_config.model_config.max_model_len)
    neox, rope = not config.rope_interleaved, config.rope_parameters
    # On a GPU casts would be launches of their own, and the plugin's kernels read vLLM's table.
    dtype = cast(torch.dtype, vllm_config.model_config.dtype)  # vLLM has made it one
    wide = current_platform.is_cpu() and dtype != torch.float32
    dtype = torch.float32 if wide else dtype
    if rope["rope_type"] == "yoco2024":
        layer: nn.Module = yoco2024_rotary_embedding(head_dim, head_dim, positions, rope["rope_theta"], neox, dtype)
        return WideRotation(layer) if wide else layer
    if rope["rope_type"] == "linear":
        positions = math.ceil(positions / rope["factor"])  # vLLM multiplies this type's table length by the factor
        rope = as_float_factor(rope)
    layer = get_rope(head_dim, positions, is_neox_style=neox, rope_parameters=rope, dtype=dtype)
    return WideRotation(layer) if wide else layer
