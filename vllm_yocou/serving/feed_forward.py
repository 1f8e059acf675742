"""The feed-forward of a served layer: vLLM's SwiGLU, or its fused experts, routed anew in every iteration.

Shapes: N tokens, D hidden_size, E experts, L width of what latent experts read and write.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul, SiluAndMulWithClamp
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP
from vllm.platforms import current_platform

from vllm_yocou.config import YocoUConfig
from vllm_yocou.serving.batch_invariance import experts_accepted, is_fixed
from vllm_yocou.serving.expert_kernels import check_clamp, choose_loop
from vllm_yocou.serving.fixed_sigmoid import FixedSiluAndMul, sigmoid
from vllm_yocou.serving.norm import norm
from vllm_yocou.workarounds import exchange_rows_on_cpu


def activation(limit: float | None) -> nn.Module:
    """SwiGLU's, clamped where there is a limit."""
    if is_fixed():
        return FixedSiluAndMul(limit)
    return SiluAndMul() if limit is None else SiluAndMulWithClamp(limit)


class SwiGLU(LlamaMLP):
    """vLLM's feed-forward of a dense layer."""

    def __init__(self, *args: Any, swiglu_limit: float | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.act_fn = activation(swiglu_limit)  # type: ignore[assignment]  # of vLLM's one kind


class SharedExpert(Qwen2MoeMLP):
    """vLLM's shared expert."""

    def __init__(self, *args: Any, swiglu_limit: float | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.act_fn = activation(swiglu_limit)  # type: ignore[assignment]  # of vLLM's one kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.expert_gate is None or not is_fixed():
            return super().forward(x)
        gate_up_NX, _ = self.gate_up_proj(x)
        out_ND, _ = self.down_proj(self.act_fn(gate_up_NX))
        return sigmoid(self.expert_gate(x)[0]) * out_ND


class Transform(nn.Module):
    """A function as the module that vLLM's runner takes; the layers that it calls stay their owner's alone."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class MixtureOfExperts(nn.Module):
    """Softmax over all experts, the top k of them, plus an optional (optionally gated) shared expert.

    Latent experts read and write vectors of L instead of D; router and shared expert do not.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = cast(YocoUConfig, vllm_config.model_config.hf_config)
        quant, D, L = vllm_config.quant_config, config.hidden_size, config.moe_latent_size
        # A config has all three or none.
        assert config.num_experts and config.num_experts_per_tok and config.moe_intermediate_size
        # vLLM's `force_fp32_compute` would round the weights where it has a kernel for rounded ones.
        router_dtype = torch.float32 if config.router_in_fp32 else None
        # vLLM's softmax over experts is computed in the scores' dtype on a CPU, and in float32 on GPUs.
        scores_dtype = torch.float32 if current_platform.is_cpu() else router_dtype
        self.gate = GateLinear(
            D, config.num_experts, out_dtype=scores_dtype, params_dtype=router_dtype, prefix=f"{prefix}.gate"
        )
        self.shared_expert: SharedExpert | None = None
        self.shared_expert_gate: nn.Module | None = None
        # Where the config says nothing, `drop_gate` follows if the weights hold none.
        if config.shared_expert_gate or config.leaves_gate_to_weights:
            self.shared_expert_gate = ReplicatedLinear(D, 1, bias=False, prefix=f"{prefix}.shared_expert_gate")
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = SharedExpert(
                D,
                config.shared_expert_intermediate_size,
                config.hidden_act,
                quant_config=quant,
                reduce_results=False,  # once, together with the routed experts
                expert_gate=self.shared_expert_gate,
                swiglu_limit=config.swiglu_limit,
                prefix=f"{prefix}.shared_expert",
            )
        latent: dict[str, Any] = {}
        self.fc1_latent_norm = self.fc2_latent_norm = None
        if L is not None:
            self.fc1_latent_proj = ReplicatedLinear(
                D, L, bias=False, quant_config=quant, prefix=f"{prefix}.fc1_latent_proj"
            )
            self.fc2_latent_proj = ReplicatedLinear(
                L, D, bias=False, quant_config=quant, prefix=f"{prefix}.fc2_latent_proj"
            )
            if config.moe_latent_norm:
                self.fc1_latent_norm = norm(L, config.rms_norm_eps)
                self.fc2_latent_norm = norm(L, config.rms_norm_eps)
            # Between the two, vLLM sums over ranks: it takes no output transform for linear that does not say so.
            latent["routed_input_transform"] = Transform(self.into_latent)
            latent["routed_output_transform"] = Transform(self.out_of_latent)
        with experts_accepted():
            self.experts = FusedMoEFactory(
                shared_experts=self.shared_expert,
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                hidden_size=L or D,
                intermediate_size=config.moe_intermediate_size,
                renormalize=config.norm_topk_prob,
                quant_config=quant,
                router_logits_dtype=scores_dtype,
                swiglu_limit=config.swiglu_limit,
                prefix=f"{prefix}.experts",
                **latent,
            )
        if config.swiglu_limit is not None:
            check_clamp(self.experts)
        choose_loop(self.experts)
        exchange_rows_on_cpu(self.experts)

    def into_latent(self, h_ND: torch.Tensor) -> torch.Tensor:
        z_NL, _ = self.fc1_latent_proj(h_ND)
        return z_NL if self.fc1_latent_norm is None else self.fc1_latent_norm(z_NL)

    def out_of_latent(self, r_NL: torch.Tensor) -> torch.Tensor:
        """From the weighted sum of all experts."""
        if self.fc2_latent_norm is not None:
            r_NL = self.fc2_latent_norm(r_NL)
        out_ND, _ = self.fc2_latent_proj(r_NL)
        return out_ND

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


def feed_forward(vllm_config: VllmConfig, stored_layer: int, prefix: str) -> nn.Module:
    """Of the layer of this number, counted through both decoders."""
    config = cast(YocoUConfig, vllm_config.model_config.hf_config)
    if config.has_experts(stored_layer):
        return MixtureOfExperts(vllm_config, prefix)
    return SwiGLU(
        config.hidden_size,
        config.intermediate_size,
        config.hidden_act,
        quant_config=vllm_config.quant_config,
        swiglu_limit=config.swiglu_limit,
        prefix=prefix,
    )
