"""Quantize a checkpoint, without data, and serve it: `python examples/training/quantize.py FORMAT OUTPUT [MODEL]`.

FORMAT is fp8 (weights and activations) or w4a16 (weights of four bits, activations of sixteen). Weights are rounded to
the nearest number; in four bits a method that looks at data, as llm-compressor has, loses less. OUTPUT gets the
checkpoint with the tokenizer, in the format of compressed-tensors.
"""

import argparse
from pathlib import Path

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import nn
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from vllm_yocou.reference import YocoUForCausalLM

TRAINED = Path(__file__).parents[1] / "yoco-u-kjv"
PROMPTS = ["In the beginning", "And Jesus said unto them,"]
FORMATS = {"fp8": "FP8_DYNAMIC", "w4a16": "W4A16"}  # presets of compressed-tensors
GROUP = 32  # weights of a row that share a scale, in four bits; divides all widths of the trained checkpoint


def quantize(checkpoint: str, preset: str, output: Path) -> None:
    model = YocoUForCausalLM.from_pretrained(checkpoint)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size is not None:
        scheme.weights.group_size = GROUP
    # The head and what chooses among experts stay as they are.
    ignore = ["lm_head", r"re:.*\.gate$", r"re:.*\.shared_expert_gate$"]
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=ignore))
    for linear in model.modules():
        if isinstance(linear, nn.Linear) and hasattr(linear, "quantization_scheme"):
            groups_OGI = linear.weight.detach().unflatten(1, (-1, scheme.weights.group_size or linear.in_features))
            scale_OG, _ = calculate_qparams(groups_OGI.amin(-1), groups_OGI.amax(-1), scheme.weights)
            linear.weight_scale.data = scale_OG
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(output)
    compressor.update_config(output)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("output", type=Path)
    parser.add_argument("model", nargs="?", default=str(TRAINED))
    arguments = parser.parse_args()
    quantize(arguments.model, FORMATS[arguments.format], arguments.output)
    llm = LLM(str(arguments.output), dtype="bfloat16", kv_cache_memory_bytes=256 << 20, max_num_batched_tokens=512)
    for result in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=40)):
        print(f"{result.prompt!r} -> {result.outputs[0].text!r}")


if __name__ == "__main__":
    main()
