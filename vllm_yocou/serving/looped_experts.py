"""Clamped experts on a CPU, where no kernel of vLLM's clamps: a loop over the experts that rows have chosen.

Shapes: N rows, R rows of one expert, X width that experts read and write, E experts, F their own width, k experts that
a row uses.
"""

from typing import Any

import torch
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.utils.torch_utils import direct_register_custom_op


def clamped_experts(
    out_NX: torch.Tensor,
    x_NX: torch.Tensor,
    gate_up_EFX: torch.Tensor,
    down_EXF: torch.Tensor,
    weights_Nk: torch.Tensor,
    chosen_Nk: torch.Tensor,
    limit: float,
) -> None:
    """Write the weighted sum of each row's experts into `out_NX`; the rows of `gate_up_EFX` are F gates, then F ups.

    An operator, since compiled code cannot loop over the experts that rows have chosen.
    """
    sum_NX = torch.zeros_like(x_NX, dtype=torch.float32)
    for expert in map(int, chosen_Nk.unique()):
        rows, slots = (chosen_Nk == expert).nonzero(as_tuple=True)
        gate_RF, up_RF = F.linear(x_NX[rows], gate_up_EFX[expert]).chunk(2, dim=-1)
        h_RF = F.silu(gate_RF.clamp(max=limit)) * up_RF.clamp(-limit, limit)
        sum_NX.index_add_(0, rows, F.linear(h_RF, down_EXF[expert]) * weights_Nk[rows, slots, None].float())
    out_NX.copy_(sum_NX)


def clamped_experts_fake(
    out_NX: torch.Tensor,
    x_NX: torch.Tensor,
    gate_up_EFX: torch.Tensor,
    down_EXF: torch.Tensor,
    weights_Nk: torch.Tensor,
    chosen_Nk: torch.Tensor,
    limit: float,
) -> None:
    return None


direct_register_custom_op(
    op_name="yocou_clamped_experts",
    op_func=clamped_experts,
    mutates_args=["out_NX"],
    fake_impl=clamped_experts_fake,
)


class LoopedExperts(CPUUnquantizedExperts):
    """vLLM's experts on a CPU, whose weights stay as they were loaded and are multiplied expert by expert."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack nothing."""

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        limit = self.moe_config.swiglu_limit
        assert limit is not None
        torch.ops.vllm.yocou_clamped_experts(output, hidden_states, w1, w2, topk_weights, topk_ids, limit)


class LoopedMethod(UnquantizedFusedMoEMethod):
    """vLLM's method for experts that are not quantized, with the loop for its kernel."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.experts_cls = LoopedExperts
