"""Experts on a CPU in a loop over those that rows have chosen, where no kernel of vLLM's computes the right thing.

None of its kernels clamps, none passes over the experts of other ranks, and none fixes the shapes of its products.

Shapes: N rows, R rows of one expert, X width that experts read and write, E experts of this rank, F their own width, k
experts that a row uses.
"""

from typing import Any

import torch
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe import MoERunner, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_yocou.serving.batch_invariance import experts_accepted, is_fixed
from vllm_yocou.serving.fixed_sigmoid import silu
from vllm_yocou.serving.fixed_tiles import known_sizes, multiply_in_tiles, unpacked


def loop_over_experts(runner: MoERunner) -> None:
    """Have unquantized experts computed by the loop; called before their weights are loaded."""
    with experts_accepted():
        runner._replace_quant_method(LoopedMethod(runner.moe_config))


def looped_experts(
    out_NX: torch.Tensor,
    x_NX: torch.Tensor,
    gate_up_EFX: torch.Tensor,
    down_EXF: torch.Tensor,
    weights_Nk: torch.Tensor,
    chosen_Nk: torch.Tensor,
    own: torch.Tensor | None,
    limit: float | None,
    fixed: bool,
) -> None:
    """Write the weighted sum of each row's experts on this rank into `out_NX`.

    The rows of `gate_up_EFX` are F gates, then F ups. `own` gives the place of each expert of all ranks among the E,
    -1 for one of another rank's; None where all are this rank's. With `fixed`, no bit of a row depends on the other
    rows.

    An operator, since compiled code cannot loop over the experts that rows have chosen.
    """
    product = tiled_product if fixed else F.linear
    sum_NX = torch.zeros_like(x_NX, dtype=torch.float32)
    places_Nk = chosen_Nk if own is None else own[chosen_Nk]
    for expert in map(int, places_Nk.unique()):
        if expert < 0:
            continue
        rows, slots = (places_Nk == expert).nonzero(as_tuple=True)
        gate_RF, up_RF = product(x_NX[rows], gate_up_EFX[expert]).chunk(2, dim=-1)
        if limit is not None:
            gate_RF, up_RF = gate_RF.clamp(max=limit), up_RF.clamp(-limit, limit)
        h_RF = (silu if fixed else F.silu)(gate_RF) * up_RF
        sum_NX.index_add_(0, rows, product(h_RF, down_EXF[expert]) * weights_Nk[rows, slots, None].float())
    out_NX.copy_(sum_NX)


def tiled_product(x_RX: torch.Tensor, weight_YX: torch.Tensor) -> torch.Tensor:
    out_RY = x_RX.new_empty(len(x_RX), len(weight_YX))
    outputs, inputs = weight_YX.shape
    sizes = known_sizes(unpacked, outputs, inputs, weight_YX.dtype, has_bias=False)
    multiply_in_tiles(lambda tile_nX: F.linear(tile_nX, weight_YX), x_RX, sizes, out_RY)
    return out_RY


def looped_experts_fake(
    out_NX: torch.Tensor,
    x_NX: torch.Tensor,
    gate_up_EFX: torch.Tensor,
    down_EXF: torch.Tensor,
    weights_Nk: torch.Tensor,
    chosen_Nk: torch.Tensor,
    own: torch.Tensor | None,
    limit: float | None,
    fixed: bool,
) -> None:
    return None


direct_register_custom_op(
    op_name="yocou_looped_experts",
    op_func=looped_experts,
    mutates_args=["out_NX"],
    fake_impl=looped_experts_fake,
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
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        limit = self.moe_config.swiglu_limit
        torch.ops.vllm.yocou_looped_experts(
            output, hidden_states, w1, w2, topk_weights, topk_ids, expert_map, limit, is_fixed()
        )


class LoopedMethod(UnquantizedFusedMoEMethod):
    """vLLM's method for experts that are not quantized, with the loop for its kernel."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.experts_cls = LoopedExperts
