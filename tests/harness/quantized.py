"""Quantized checkpoints of tiny models, each with the reference model that computes the same numbers.

compressed-tensors writes its own; AWQ and GPTQ are packed by vLLM's helpers. The reference holds the weights as they
are after quantization, and rounds activations where the format does, as vLLM's kernels do: by a scale for each token.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import nn
from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack, gptq_pack, quantize_weights
from vllm.scalar_type import scalar_types

from vllm_yocou.reference import YocoUForCausalLM

GROUP = 32  # inputs that share a scale, in four bits
GATES = r"(lambda_proj|_attn\.gate_proj)"
FP8 = torch.float8_e4m3fn


def to_int8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def to_fp8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True) / torch.finfo(FP8).max
    return (x / scale).to(FP8).to(x.dtype) * scale


@dataclass(frozen=True)
class Format:
    """How a checkpoint is written, the dtype that vLLM wants on a CPU, and how activations are rounded, if they are."""

    write: Callable[[YocoUForCausalLM, Path], YocoUForCausalLM]
    dtype: str
    activations: Callable[[torch.Tensor], torch.Tensor] | None = None
    sizes: dict[str, int] = field(default_factory=dict)  # of a model, over tiny.config's

    def save(self, model: YocoUForCausalLM, folder: Path) -> YocoUForCausalLM:
        """Write `model` quantized; return the reference."""
        reference = self.write(copy.deepcopy(model), folder)
        if self.activations is not None:
            for linear in matrices(reference).values():
                linear.register_forward_pre_hook(lambda module, args: (self.activations(*args),))
        return reference


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """What is quantized: all projections, not the head and not the gates of heads."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if not re.search(f"lm_head|{GATES}", name)}


def compressed(preset: str) -> Callable:
    """Write a checkpoint of compressed-tensors by one of its presets, with scales from the weights' extremes."""

    def write(model: YocoUForCausalLM, folder: Path) -> YocoUForCausalLM:
        reference = copy.deepcopy(model)
        scheme = preset_name_to_scheme(preset, ["Linear"])
        if scheme.weights.group_size is not None:
            scheme.weights.group_size = GROUP
        apply_quantization_config(
            model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head", f"re:.*{GATES}"])
        )
        for linear in matrices(model).values():
            groups_OGI = linear.weight.detach().unflatten(1, (-1, scheme.weights.group_size or linear.in_features))
            scale, zero = calculate_qparams(groups_OGI.amin(-1), groups_OGI.amax(-1), scheme.weights)
            linear.weight_scale.data = scale
            if hasattr(linear, "weight_zero_point"):
                linear.weight_zero_point.data = zero
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        compressor.decompress_model(model)
        for name, linear in matrices(reference).items():
            linear.weight.data = model.get_submodule(name).weight.data.float()
        return reference

    return write


def packed(method: str) -> Callable:
    """Write an AWQ or GPTQ checkpoint of four bits."""

    def write(model: YocoUForCausalLM, folder: Path) -> YocoUForCausalLM:
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name, linear in matrices(model).items():
            inputs, outputs = linear.in_features, linear.out_features
            kind, awq = scalar_types.uint4 if method == "awq" else scalar_types.uint4b8, method == "awq"
            rounded_IO, q_IO, scales, zeros = quantize_weights(linear.weight.data.t().contiguous(), kind, GROUP, awq)
            linear.weight.data = rounded_IO.t().contiguous()
            del tensors[f"{name}.weight"]
            tensors[f"{name}.scales"] = scales
            if awq:
                tensors[f"{name}.qweight"] = awq_pack(q_IO, 4, inputs, outputs)
                tensors[f"{name}.qzeros"] = awq_pack(zeros, 4, inputs // GROUP, outputs)
            else:
                tensors[f"{name}.qweight"] = gptq_pack(q_IO, 4, inputs, outputs)
                # Eight numbers of four bits: the zero point 8, less one as the format has it.
                tensors[f"{name}.qzeros"] = torch.full((inputs // GROUP, outputs // 8), 0x77777777, dtype=torch.int32)
                tensors[f"{name}.g_idx"] = torch.arange(inputs, dtype=torch.int32) // GROUP
        save_file(tensors, folder / "model.safetensors")
        settings = dict(zero_point=True, version="gemm") if method == "awq" else dict(desc_act=False, sym=True)
        config = model.config.to_dict() | {
            "architectures": [type(model).__name__],
            "quantization_config": dict(quant_method=method, bits=4, group_size=GROUP, **settings),
        }
        (folder / "config.json").write_text(json.dumps(config))
        return model

    return write


# A width of 88 leaves int8 to oneDNN on every processor. Where AMX's tiles divide the sizes of a matrix, vLLM
# multiplies by a kernel that takes half precision alone, in which almost every activation rounds to another number.
FORMATS = {
    "compressed-tensors-w8a8": Format(compressed("W8A8"), "float32", to_int8, {"hidden_size": 88}),
    "compressed-tensors-w4a16": Format(compressed("W4A16"), "bfloat16"),
    "compressed-tensors-fp8": Format(compressed("FP8_DYNAMIC"), "float32", to_fp8),
    "awq": Format(packed("awq"), "bfloat16"),
    "gptq": Format(packed("gptq"), "bfloat16"),
}
