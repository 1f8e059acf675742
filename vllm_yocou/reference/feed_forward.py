"""The reference model's feed-forward: SwiGLU, alone or as the experts of a mixture.

Shapes: B sequences, N tokens, D hidden_size, E experts, k experts that a token uses.
"""

import torch
from torch import nn
from torch.nn import functional as F

from vllm_yocou.config import YocoUConfig


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(h)) * up(h))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, h_BND: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(h_BND)) * self.up_proj(h_BND))


class MoE(nn.Module):
    """Mixture of experts by a loop over all of them. A shared expert and its sigmoid gate are optional."""

    def __init__(self, config: YocoUConfig):
        super().__init__()
        E, k, width = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
        assert E and k and width, "only a config with is_moe has experts"
        self.top_k = k
        self.renormalise = config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, E, bias=False)
        self.experts = nn.ModuleList(MLP(config.hidden_size, width) for _ in range(E))
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = MLP(config.hidden_size, config.shared_expert_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def drop_gate(self) -> None:
        """Take away a gate that was built before anyone knew that the weights hold none."""
        self.shared_expert_gate = None

    def forward(self, h_BND: torch.Tensor) -> torch.Tensor:
        h_ND = h_BND.flatten(0, -2)
        probabilities_NE = self.gate(h_ND).softmax(-1, dtype=torch.promote_types(h_ND.dtype, torch.float32))
        weights_Nk, chosen_Nk = probabilities_NE.topk(self.top_k)
        if self.renormalise:
            weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
        out_ND = torch.zeros_like(h_ND)
        for e, expert in enumerate(self.experts):
            rows, slots = (chosen_Nk == e).nonzero(as_tuple=True)
            routed = expert(h_ND[rows]) * weights_Nk[rows, slots, None].to(h_ND.dtype)
            out_ND = out_ND.index_add(0, rows, routed)
        if self.shared_expert is not None:
            shared_ND = self.shared_expert(h_ND)
            if self.shared_expert_gate is not None:
                shared_ND = shared_ND * self.shared_expert_gate(h_ND).sigmoid()
            out_ND = out_ND + shared_ND
        return out_ND.view_as(h_BND)
