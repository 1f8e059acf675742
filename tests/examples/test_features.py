"""The short examples that need no server, each run as a script, in this process."""

import ast
import json
import runpy

import peft
import pytest
import torch
from harness.checkout import ROOT, TRAINED
from transformers import CompressedTensorsConfig

from vllm_yocou.reference import YocoUForCausalLM

BEGINNING, SAYING = "In the beginning", "And Jesus said unto them,"


@pytest.fixture
def run(engine, monkeypatch, capsys):
    """Runs an example with arguments and returns the lines it prints; its engine is eager and ends with the test."""
    import vllm

    start = vllm.LLM

    def started(*args, **settings):
        engine.started.append(start(*args, compilation_config={"mode": 0}, **settings))
        return engine.started[-1]

    def run(name: str, *arguments: str, folder: str = "inference") -> list[str]:
        path = ROOT / "examples" / folder / name
        monkeypatch.setattr(vllm, "LLM", started)
        monkeypatch.setattr("sys.argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def generated(model: YocoUForCausalLM, tokenizer, prompt: str) -> str:
    tokens = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**tokens, max_new_tokens=40, do_sample=False)[0, tokens.input_ids.shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_offline_answers_are_the_references(run, tokenizer, reference):
    printed = run("offline.py", str(TRAINED), BEGINNING, SAYING)
    for prompt in (BEGINNING, SAYING):
        assert f"{prompt!r} -> {generated(reference, tokenizer, prompt)!r}" in printed


def test_lora_answers_with_and_without_the_adapter(run, tokenizer, tmp_path):
    model = YocoUForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()
    plain = {prompt: generated(model, tokenizer, prompt) for prompt in (BEGINNING, SAYING)}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload().eval()
    printed = run("lora.py", str(tmp_path))
    for prompt, answer in plain.items():
        other = generated(merged, tokenizer, prompt)
        assert other != answer
        assert f"none: {prompt!r} -> {answer!r}" in printed and f"adapter: {prompt!r} -> {other!r}" in printed


def test_another_t_is_the_reference_at_that_t(run, tokenizer, reference):
    model = YocoUForCausalLM.from_pretrained(TRAINED, dtype=torch.float32, num_iterations=2).eval()
    expected = generated(model, tokenizer, BEGINNING)
    assert expected != generated(reference, tokenizer, BEGINNING)
    assert f"T = 2: {BEGINNING!r} -> {expected!r}" in run("other_t.py", "2")


def test_structured_output_follows_the_schema(run):
    printed = run("structured.py")
    answers = [json.loads(line.partition(" -> ")[2]) for line in printed if line.startswith(("'In ", "'And "))]
    assert len(answers) == 2
    for answer in answers:
        assert answer.keys() == {"book", "chapter"} and isinstance(answer["chapter"], int)
        assert answer["book"] in ("Genesis", "Exodus", "Psalm", "Isaiah", "Matthew", "John", "Revelation")
        assert 1 <= answer["chapter"] <= 50


def behind(model: YocoUForCausalLM, tokenizer, prompt: str, text: str) -> float:
    """How far, in nats, a greedy answer's tokens are behind the model's best at most."""
    start, tokens = (len(tokenizer.encode(part)) for part in (prompt, prompt + text))
    ids = tokenizer(prompt + text, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(ids).logits[0, start - 1 : tokens - 1]
    return (logits.amax(-1) - logits.gather(-1, ids[0, start:, None])[:, 0]).max().item()


@pytest.mark.parametrize("name, size", [("fp8", 0.65), pytest.param("w4a16", 0.48, marks=pytest.mark.slow)])
def test_a_quantized_checkpoint_is_smaller_and_answers_as_its_weights_do(name, size, run, tokenizer, tmp_path):
    """transformers reads the weights back in float32, so that bfloat16 may decide a near tie otherwise."""
    printed = run("quantize.py", name, str(tmp_path), folder="training")
    pairs = [line.split(" -> ") for line in printed if line.startswith(("'In ", "'And "))]
    answers = {ast.literal_eval(prompt): ast.literal_eval(text) for prompt, text in pairs}
    settings = dict(dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True))
    quantized = YocoUForCausalLM.from_pretrained(tmp_path, **settings).eval()
    assert answers.keys() == {BEGINNING, SAYING}
    assert max(behind(quantized, tokenizer, *answer) for answer in answers.items()) < 0.1
    written, plain = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path, TRAINED))
    assert written < plain * size
