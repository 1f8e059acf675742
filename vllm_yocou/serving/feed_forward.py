"""The feed-forward of a served layer: vLLM's SwiGLU, or its fused experts, routed anew in every iteration.

Shapes: N tokens, D hidden_size, E experts.
"""

from typing import cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP

from vllm_yocou.config import YocoUConfig


class MixtureOfExperts(nn.Module):
    """Softmax over all experts, the top k of them, plus an optional (optionally gated) shared expert."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = cast(YocoUConfig, vllm_config.model_config.hf_config)
        quant = vllm_config.quant_config
        # A config has all three or none.
        assert config.num_experts and config.num_experts_per_tok and config.moe_intermediate_size
        self.gate = GateLinear(config.hidden_size, config.num_experts, prefix=f"{prefix}.gate")
        self.shared_expert: Qwen2MoeMLP | None = None
        self.shared_expert_gate: nn.Module | None = None
        # Where the config says nothing, `drop_gate` follows if the weights hold none.
        if config.shared_expert_gate or config.leaves_gate_to_weights:
            self.shared_expert_gate = ReplicatedLinear(
                config.hidden_size, 1, bias=False, prefix=f"{prefix}.shared_expert_gate"
            )
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = Qwen2MoeMLP(
                config.hidden_size,
                config.shared_expert_intermediate_size,
                config.hidden_act,
                quant_config=quant,
                reduce_results=False,  # once, together with the routed experts
                expert_gate=self.shared_expert_gate,  # type: ignore[arg-type]  # vLLM's own models give it this layer too
                prefix=f"{prefix}.shared_expert",
            )
        self.experts = FusedMoEFactory(
            shared_experts=self.shared_expert,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            quant_config=quant,
            prefix=f"{prefix}.experts",
        )

    def drop_gate(self) -> None:
        """Take the shared expert's gate away: the weights that were loaded hold none."""
        self.shared_expert_gate = None
        if self.shared_expert is not None:
            self.shared_expert.expert_gate = None

    def forward(self, h_ND: torch.Tensor) -> torch.Tensor:
        logits_NE, _ = self.gate(h_ND)
        return self.experts(hidden_states=h_ND, router_logits=logits_NE)


def decide_gate(model: nn.Module, config: YocoUConfig, loaded: set[str]) -> None:
    """Let the names of the weights that were loaded say whether shared experts are gated, if `config` does not.

    Nothing is compiled before, and what compiled code is kept under has `config` in it.
    """
    if not config.leaves_gate_to_weights:
        return
    config.shared_expert_gate = any(".shared_expert_gate." in name for name in loaded)
    if not config.shared_expert_gate:
        for module in model.modules():
            if isinstance(module, MixtureOfExperts):
                module.drop_gate()


def feed_forward(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    config = cast(YocoUConfig, vllm_config.model_config.hf_config)
    if config.is_moe:
        return MixtureOfExperts(vllm_config, prefix)
    return LlamaMLP(
        config.hidden_size,
        config.intermediate_size,
        config.hidden_act,
        quant_config=vllm_config.quant_config,
        prefix=prefix,
    )
