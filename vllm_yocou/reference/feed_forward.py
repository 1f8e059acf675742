"""The reference model's feed-forward: SwiGLU, alone or as the experts of a mixture.

Shapes: B sequences, N tokens, D hidden_size, E experts, k experts that a token uses, X the width that routed experts
read and write: moe_latent_size, or D without it.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference.precision import at_least_float32


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(h)) * up(h)), with gate at most `limit` and up within plus and minus it."""

    def __init__(self, hidden_size: int, intermediate_size: int, limit: float | None):
        super().__init__()
        self.limit = limit
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, h_BND: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(h_BND), self.up_proj(h_BND)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down_proj(F.silu(gate) * up)


class Float32Router(nn.Linear):
    """Scores of the experts in float32 at least: neither loading a model nor casting it narrows the weight."""

    def __init__(self, hidden_size: int, experts: int):
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        super().__init__(hidden_size, experts, bias=False, dtype=dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Float32Router":
        """What `to`, `bfloat16` and their like call: move the weight, and cast it only to a dtype as wide."""

        def at_least(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == at_least_float32(applied) else tensor.to(applied.device)

        return super()._apply(at_least, recurse)

    def forward(self, h_ND: torch.Tensor) -> torch.Tensor:
        with torch.autocast(h_ND.device.type, enabled=False):  # which would multiply in 16 bits
            return super().forward(h_ND.to(self.weight.dtype))


class MoE(nn.Module):
    """Mixture of experts by a loop over all of them. A shared expert and its sigmoid gate are optional.

    With a latent width the routed experts, and they alone, read a projection of h, and the projection back reads their
    weighted sum.
    """

    def __init__(self, config: YocoUConfig):
        super().__init__()
        D, E, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
        k = config.num_experts_per_tok
        assert E and k and width, "only a config with is_moe has experts"
        self.top_k = k
        self.renormalise = config.norm_topk_prob
        self.gate = Float32Router(D, E) if config.router_in_fp32 else nn.Linear(D, E, bias=False)
        X = config.moe_latent_size or D
        self.experts = nn.ModuleList(MLP(X, width, config.swiglu_limit) for _ in range(E))
        self.fc1_latent_proj = self.fc2_latent_proj = self.fc1_latent_norm = self.fc2_latent_norm = None
        if config.moe_latent_size is not None:
            self.fc1_latent_proj, self.fc2_latent_proj = nn.Linear(D, X, bias=False), nn.Linear(X, D, bias=False)
            if config.moe_latent_norm:
                self.fc1_latent_norm = nn.RMSNorm(X, config.rms_norm_eps)
                self.fc2_latent_norm = nn.RMSNorm(X, config.rms_norm_eps)
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = MLP(D, config.shared_expert_intermediate_size, config.swiglu_limit)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(D, 1, bias=False)

    def drop_gate(self) -> None:
        """Take away a gate that was built before anyone knew that the weights hold none."""
        self.shared_expert_gate = None

    def forward(self, h_BND: torch.Tensor, routed_BNk: torch.Tensor | None = None) -> torch.Tensor:
        """`routed_BNk` replays what another computation has chosen; where it is negative, this one chooses."""
        h_ND = h_BND.flatten(0, -2)
        probabilities_NE = self.gate(h_ND).softmax(-1, dtype=torch.promote_types(h_ND.dtype, torch.float32))
        weights_Nk, chosen_Nk = probabilities_NE.topk(self.top_k)
        if routed_BNk is not None:
            routed_Nk = routed_BNk.flatten(0, -2).to(chosen_Nk)
            chosen_Nk = routed_Nk.where(routed_Nk >= 0, chosen_Nk)
            weights_Nk = probabilities_NE.gather(-1, chosen_Nk)
        if self.renormalise:
            weights_Nk = weights_Nk / weights_Nk.sum(-1, keepdim=True)
        z_NX = through(h_ND, self.fc1_latent_proj, self.fc1_latent_norm)
        # As kernels for experts do, weighted and added in float32 at least, and rounded once.
        out_NX = torch.zeros_like(z_NX, dtype=weights_Nk.dtype)
        for e, expert in enumerate(self.experts):
            rows, slots = (chosen_Nk == e).nonzero(as_tuple=True)
            out_NX = out_NX.index_add(0, rows, expert(z_NX[rows]) * weights_Nk[rows, slots, None])
        out_ND = through(out_NX.to(z_NX.dtype), self.fc2_latent_norm, self.fc2_latent_proj)
        if self.shared_expert is not None:
            shared_ND = self.shared_expert(h_ND)
            if self.shared_expert_gate is not None:
                shared_ND = shared_ND * self.shared_expert_gate(h_ND).sigmoid()
            out_ND = out_ND + shared_ND
        return out_ND.view_as(h_BND)


def through(x: torch.Tensor, *modules: nn.Module | None) -> torch.Tensor:
    """x through those of the modules that the model has, one after the other."""
    for module in modules:
        x = x if module is None else module(x)
    return x
