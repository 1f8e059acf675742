"""Quantized checkpoints through vLLM's linear layers: the served model is the quantized reference, not just near it."""

import json
import re
from contextlib import nullcontext

import pytest
import torch
from harness import processor, tiny
from harness.checkout import needs_compiler
from harness.engines import generate
from harness.half_precision import HalfPrecision
from harness.quantized import FORMATS, matrices, to_fp8
from safetensors.torch import load_file
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_yocou.checkpoints.verify import verified
from vllm_yocou.config import YocoUConfig

LONG = [tiny.prompt(length) for length in (36, 37, 90, 333)]
SHORT = [tiny.prompt(2, seed) for seed in range(16)]


def differences(model, prompts, outputs) -> torch.Tensor:
    """|Δlogprob| of every log probability that was returned for a generated token."""
    found = []
    for prompt, output in zip(prompts, outputs, strict=True):
        (completion,) = output.outputs
        with torch.inference_mode():
            rows = model(torch.tensor([[*prompt, *completion.token_ids]])).logits[0].log_softmax(-1)
        for row, served in zip(rows[len(prompt) - 1 :], completion.logprobs, strict=False):
            found += [abs(entry.logprob - row[token].item()) for token, entry in served.items()]
    return torch.tensor(found)


def check(model, reference, outputs, exact: bool) -> None:
    """Against what quantization itself does to the answers.

    Where activations are rounded, a rounding error of float32 now and then tips one over to the next number, and a long
    prompt has many; where none tips, the served model is exact.
    """
    short, long = outputs[: len(SHORT)], outputs[len(SHORT) :]
    if exact:
        assert differences(reference, SHORT, short).median() < 1e-5 < 1e-3 < differences(model, SHORT, short).median()
    assert differences(reference, LONG, long).median() < differences(model, LONG, long).median() / 3


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_checkpoints(name, engine, tmp_path):
    quantized = FORMATS[name]
    model = tiny.model(tiny.config(qk_norm="all", **quantized.sizes))
    reference = quantized.save(model, tmp_path)
    outputs = generate(engine(tmp_path, dtype=quantized.dtype), [*SHORT, *LONG])
    check(model, reference, outputs, exact=quantized.dtype == "float32")


@pytest.mark.parametrize("name", ["compressed-tensors-w8a8", "gptq"])
@pytest.mark.parametrize("gates", [dict(differential_attention="v2"), dict(headwise_glu=True)], ids=["pairs", "heads"])
def test_biases_and_gates_stay_as_they_are(gates, name, engine, nightly, tmp_path):
    quantized = FORMATS[name]
    model = tiny.model(tiny.config(swiglu_limit=0.4, **gates, **tiny.BIAS, **quantized.sizes))
    reference = quantized.save(model, tmp_path)
    outputs = generate(engine(tmp_path, dtype=quantized.dtype), [*SHORT, *LONG])
    check(model, reference, outputs, exact=quantized.dtype == "float32")


@pytest.mark.parametrize(
    "width, by_tiles", [(FORMATS["compressed-tensors-w8a8"].sizes["hidden_size"], False), (96, True)]
)
def test_int8_is_left_to_one_kernel_on_every_processor(width, by_tiles, monkeypatch):
    """With AMX, vLLM's other kernel takes the sizes that tiles divide, and then only half precision."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    shapes = [linear.weight.shape for linear in matrices(tiny.model(tiny.config(hidden_size=width))).values()]
    assert any(check_cpu_sgl_kernel(*shape, torch.int8) for shape in shapes) == by_tiles


@pytest.mark.parametrize(
    "width, dtype, refused", [(96, "float32", True), (96, "bfloat16", False), (88, "float32", False)]
)
def test_int8_in_float32_is_refused_where_amx_would_take_it(width, dtype, refused, tmp_path, monkeypatch):
    FORMATS["compressed-tensors-w8a8"].save(tiny.model(tiny.config(hidden_size=width)), tmp_path)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    arguments = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, dtype=dtype, enforce_eager=True)
    with pytest.raises(ValueError, match=r"W8A8 checkpoint .* use --dtype bfloat16") if refused else nullcontext():
        arguments.create_engine_config()


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM's kernel for tiles needs AMX")
def test_int8_by_tiles(engine, nightly, tmp_path):
    """In bfloat16 almost every activation rounds to another number: as exact as the reference in that type."""
    reference = FORMATS["compressed-tensors-w8a8"].save(tiny.model(tiny.config(qk_norm="all")), tmp_path)
    oracle = HalfPrecision(reference, torch.bfloat16)
    for prompt, output in zip(LONG, generate(engine(tmp_path, dtype="bfloat16"), LONG), strict=True):
        oracle.compare(prompt, output)
    oracle.check()


@pytest.mark.parametrize(
    "experts, method, sentence",
    [
        (
            False,
            "fp8",
            "--quantization fp8 cannot be used on a CPU: vLLM has no kernel for it there, use fp8_per_channel.",
        ),
        (False, "fp8_per_tensor", "--quantization fp8_per_tensor cannot be used on a CPU"),
        (True, "fp8_per_channel", "--quantization fp8_per_channel with a mixture of experts cannot be used on a CPU"),
        (True, "fp8", "--quantization fp8 with a mixture of experts cannot be used on a CPU"),
        (False, "int8_per_channel_weight_only", "it quantizes experts alone and the model has none"),
        (False, "nvfp4_per_token", "it quantizes experts alone and the model has none"),
        (False, "experts_int8", "it quantizes experts alone and the model has none"),
        (True, "experts_int8", None),
        (False, "fp8_per_channel", None),
    ],
)
def test_quantization_of_a_plain_checkpoint(experts, method, sentence, tmp_path):
    config = tiny.moe_config(shared_expert_gate=False) if experts else tiny.config()
    config.architectures = ["YocoUForCausalLM"]
    config.save_pretrained(tmp_path)
    start(tmp_path, sentence, quantization=method)


def start(folder, sentence: str | None, **settings) -> None:
    """Configure an engine, which ends in `sentence` unless it is None."""
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", load_format="dummy", **settings
    )
    with nullcontext() if sentence is None else pytest.raises(ValueError, match=re.escape(sentence)):
        arguments.create_engine_config()


@pytest.mark.parametrize("name", ["one-scale-a-matrix", "static-activations", "blocks", "compressed-tensors-fp8"])
def test_fp8_checkpoints_that_a_cpu_has_no_kernel_for(name, tmp_path):
    stored = {
        "one-scale-a-matrix": {"quant_method": "fp8", "activation_scheme": "dynamic"},
        "blocks": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    }
    model = tiny.model(tiny.config())
    if name in stored:
        model.config.architectures, model.config.quantization_config = ["YocoUForCausalLM"], stored[name]
        model.config.save_pretrained(tmp_path)
    else:
        FORMATS["compressed-tensors-fp8"].save(model, tmp_path)
    if name == "static-activations":
        config = json.loads((tmp_path / "config.json").read_text())
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] |= {"dynamic": False, "strategy": "tensor"}
        (tmp_path / "config.json").write_text(json.dumps(config))
    refused = name in ("one-scale-a-matrix", "static-activations")
    start(tmp_path, "a checkpoint of FP8 with one scale" if refused else None)


def test_a_plain_checkpoint_in_fp8(engine, nightly, tmp_path):
    """In bfloat16 almost every activation rounds to another number: as exact as the reference in that type."""
    model = tiny.model(tiny.config(qk_norm="all"))
    model.save_pretrained(tmp_path)
    for linear in matrices(model).values():
        linear.weight.data = to_fp8(linear.weight.data)
        linear.register_forward_pre_hook(lambda module, args: (to_fp8(*args),))
    oracle = HalfPrecision(model, torch.bfloat16)
    served = generate(engine(tmp_path, dtype="bfloat16", quantization="fp8_per_channel"), LONG)
    for prompt, output in zip(LONG, served, strict=True):
        oracle.compare(prompt, output)
    oracle.check()


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("amx", [False, True])
def test_the_processor_decides_on_fp8_caches(amx, avx512, monkeypatch):
    """test_model.py asks as vLLM does, which refuses such a cache elsewhere."""
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: avx512)
    assert processor.reads_fp8_caches() == (amx or avx512)
    with nullcontext() if amx or avx512 else pytest.raises(NotImplementedError, match="FP8 KV cache on CPU requires"):
        _get_attn_isa(torch.float32, 32, 32, "fp8")


@needs_compiler
@pytest.mark.parametrize("engine_process", ["two-ranks"], indirect=True)
def test_two_ranks_compiled(engine_process, nightly, tmp_path):
    """One global KV head, which both ranks hold. Not a format that rounds activations: each rank has its own scales."""
    model, quantized = tiny.model(tiny.config(intermediate_size=192, cross_num_key_value_heads=1)), FORMATS["gptq"]
    reference = quantized.save(model, tmp_path)
    (batch,) = engine_process.run(
        tmp_path,
        [[{"prompt": prompt} for prompt in [*SHORT, *LONG]]],
        dtype=quantized.dtype,
        compilation_config={"mode": None},
    )
    check(model, reference, batch.outputs, exact=False)


@pytest.mark.parametrize(
    "name, part",
    [("gptq", "k_proj.scales"), ("gptq", "k_proj.qweight"), ("compressed-tensors-w8a8", "k_proj.weight_scale")],
)
def test_a_missing_part_of_a_matrix_is_named(name, part, tmp_path):
    """Without the check, vLLM would leave the keys' part of a fused matrix as it was allocated."""
    FORMATS[name].save(tiny.model(tiny.config()), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = f"model.self_decoder.layers.1.self_attn.{part}"
    del tensors[gone]
    config = YocoUConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"missing: {gone}[.]"):
        list(verified(tensors.items(), config, quantized=True))


def test_a_missing_matrix_is_named(engine, tmp_path):
    FORMATS["gptq"].save(tiny.model(tiny.config()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match=r"missing: model.cross_decoder.layers.2.cross_attn.o_proj.weight, "):
        engine(tmp_path, dtype="bfloat16")
