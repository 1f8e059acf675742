"""Healing from a tiny Llama to a checkpoint; a run that is resumed ends where one that was not would have."""

import json
import shutil

import pytest
import torch
from harness.checkout import training_example
from harness.llamas import save_material, upcycle
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_yocou.cli import sizing

SETTINGS = ("--sequence", "48", "--steps", "4", "--batch", "2", "--accumulate", "2", "--every", "2", "--held-out", "4")


@pytest.fixture(scope="module")
def distill():
    with training_example("distill") as module:
        yield module


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_material(folder)
    return folder


def run(distill, monkeypatch, material, output, *settings):
    command = ["distill.py", material / "llama", material / "made", output, "--text", material / "text.txt"]
    monkeypatch.setattr("sys.argv", [*map(str, command), *SETTINGS, *settings])
    distill.main()


def test_healing_writes_a_checkpoint_and_resumes_to_the_exact_step(
    distill, material, tmp_path, monkeypatch, capsys, trains
):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(distill, monkeypatch, material, whole, "--hidden", "0.5")
    printed = capsys.readouterr()
    assert "4/4" in printed.err  # the progress bar
    report = json.loads((whole / "distillation.json").read_text())
    assert report["training_tokens"] == 4 * 2 * 2 * 48 and report["held_out_tokens"] == 4 * 47
    perplexity = report["held_out_perplexity"]
    assert f"held-out perplexity: {perplexity}" in printed.out and perplexity["after"]["2"] < perplexity["before"]["2"]
    assert len(report["held_out_nats"]["after"]["2"]) == 4
    assert 0 < report["model_flops_utilisation"] < 1 and "model FLOPs utilisation: " in printed.out
    assert [entry["step"] for entry in report["history"] if "eval_loss" in entry] == [0, 2, 4]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert AutoModelForCausalLM.from_pretrained(whole).config.num_iterations == 2
    assert AutoTokenizer.from_pretrained(whole).eos_token == "<end>"

    (resumed / "steps").mkdir(parents=True)
    shutil.copytree(whole / "steps" / "checkpoint-2", resumed / "steps" / "checkpoint-2")
    # Stopped while the next one was saved.
    shutil.copytree(whole / "steps" / "checkpoint-4", resumed / "steps" / "checkpoint-3")
    (resumed / "steps" / "checkpoint-3" / "trainer_state.json").unlink()
    run(distill, monkeypatch, material, resumed, "--hidden", "0.5", "--resume")
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert {tensor.dtype for tensor in first.values()} == {torch.bfloat16}
    before = load_file(material / "made" / "model.safetensors")
    assert not any(torch.equal(first[name], before[name]) for name in before if "norm" not in name)
    first, second = (load_file(folder / "steps" / "checkpoint-4" / "model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again = json.loads((resumed / "distillation.json").read_text())
    assert again["held_out_perplexity"] == perplexity

    # Stopped after its last step, before anything was written.
    shutil.rmtree(resumed)
    (resumed / "steps").mkdir(parents=True)
    shutil.copytree(whole / "steps" / "checkpoint-4", resumed / "steps" / "checkpoint-4")
    run(distill, monkeypatch, material, resumed, "--hidden", "0.5", "--resume")
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    again = json.loads((resumed / "distillation.json").read_text())
    assert again["held_out_perplexity"] == perplexity and {path.name for path in (resumed / "steps").iterdir()} == {
        "checkpoint-4",
        "settings.json",
    }


def test_mixed_precision(distill, material, tmp_path, monkeypatch, capsys):
    """Weights stay float32 while the products are of bfloat16, on a CPU as well."""
    saved = {}
    for precision in ("float32", "bfloat16"):
        run(distill, monkeypatch, material, tmp_path / precision, "--steps", "2", "--precision", precision)
        saved[precision] = load_file(tmp_path / precision / "steps" / "checkpoint-2" / "model.safetensors")
        assert f"that a product of matrices reached in {precision}" in capsys.readouterr().out
    for name, tensor in saved["bfloat16"].items():
        assert tensor.dtype == torch.float32 and not torch.equal(tensor, tensor.bfloat16().float())
        torch.testing.assert_close(tensor, saved["float32"][name], atol=5e-3, rtol=0)
    assert any(not torch.equal(tensor, saved["float32"][name]) for name, tensor in saved["bfloat16"].items())


def test_an_interruption_tells_how_to_go_on(distill, material, tmp_path, monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "distil", interrupted)
    for saved, sentence in (
        (None, "before a step was saved: a smaller --every"),
        (12, "--resume goes on from checkpoint-12"),
    ):
        if saved:
            for step in (9, saved):
                (tmp_path / "steps" / f"checkpoint-{step}").mkdir(parents=True)
                (tmp_path / "steps" / f"checkpoint-{step}" / "trainer_state.json").touch()
        with pytest.raises(SystemExit) as exit:
            run(distill, monkeypatch, material, tmp_path)
        assert exit.value.code == 2 and sentence in capsys.readouterr().err


def test_the_loss_of_a_step(distill, material):
    """A student that is its own source, with one iteration, is at no distance from it."""
    llama = AutoModelForCausalLM.from_pretrained(material / "llama").eval()
    ids = torch.arange(20)[None] * 7
    settings = distill.TrainingArguments(output_dir=material / "steps", report_to=[])
    terms = distill.Terms(next_token=0.25, temperature=2.0, hidden=3.0, layers=2)
    upcycle(material / "llama", material / "same", self_layers=4)
    same = AutoModelForCausalLM.from_pretrained(material / "same").train()
    upcycle(material / "llama", material / "other", self_layers=3, window=4)
    other = AutoModelForCausalLM.from_pretrained(material / "other").train()
    inputs = {"input_ids": ids, "labels": ids}
    with torch.no_grad():
        theirs = llama(ids, labels=ids, output_hidden_states=True)
        trainer = distill.Distillation(model=same, args=settings, teacher=llama, terms=terms, iterations=[1])
        torch.testing.assert_close(trainer.compute_loss(same, inputs), 0.25 * theirs.loss, atol=1e-5, rtol=1e-5)
        trainer = distill.Distillation(model=other, args=settings, teacher=llama, terms=terms, iterations=[1])
        ours = other(ids, labels=ids, output_hidden_states=True)
        p, q = (theirs.logits[0] / 2).softmax(-1), (ours.logits[0] / 2).softmax(-1)
        divergence = 4 * (p * (p.log() - q.log())).sum() / 20
        # Both have five layers; states are counted from the embeddings on.
        pairs = [(ours.hidden_states[layer], theirs.hidden_states[layer]) for layer in (3, 4)]
        distances = [((a - b).pow(2).sum(-1) / b.pow(2).sum(-1)).mean() for a, b in pairs]
        expected = 0.25 * ours.loss + 0.75 * divergence + 3.0 * sum(distances) / 2
        torch.testing.assert_close(trainer.compute_loss(other, inputs), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(trainer.compute_loss(other.eval(), inputs), ours.loss)


def test_a_checkpoint_of_several_iterations(distill, material, tmp_path, monkeypatch, capsys):
    """Each step draws its T, alike in a run that goes on; the checkpoint says which were trained."""
    drawn, first, second = [], tmp_path / "first", tmp_path / "second"

    class Noted(distill.Distillation):
        def training_step(self, model, *inputs):
            hook = model.model.register_forward_pre_hook(
                lambda *_: drawn.append((self.state.global_step, model.config.num_iterations))
            )
            try:
                return super().training_step(model, *inputs)
            finally:
                hook.remove()

    monkeypatch.setattr(distill, "Distillation", Noted)
    settings = ("--iterations", "1", "2", "3", "--steps", "4", "--batch", "1", "--look-back", "0.5", "--every", "2")
    run(distill, monkeypatch, material, first, *settings)
    config = AutoModelForCausalLM.from_pretrained(first).config
    assert (config.num_iterations, config.trained_iterations) == (2, [1, 2, 3])
    perplexity = json.loads((first / "distillation.json").read_text())["held_out_perplexity"]
    assert [*perplexity["before"]] == [*perplexity["after"]] == ["1", "2", "3"]
    assert len(drawn) == 8 and len(set(drawn)) == 4  # two batches a step have one T
    assert len({T for _, T in drawn}) > 1
    whole = drawn.copy()
    drawn.clear()
    (second / "steps").mkdir(parents=True)
    shutil.copytree(first / "steps" / "checkpoint-2", second / "steps" / "checkpoint-2")
    run(distill, monkeypatch, material, second, *settings, "--resume")
    assert drawn == [(step, T) for step, T in whole if step >= 2]
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # What was trained for several T goes on so.
    drawn.clear()
    monkeypatch.setattr("sys.argv", [*map(str, ["distill.py", material / "llama", first, tmp_path / "third", "--text"]),
                                     str(material / "text.txt"), *SETTINGS])  # fmt: skip
    distill.main()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "third").config.trained_iterations == [1, 2, 3]


def test_a_run_is_neither_mixed_with_another_nor_continued_otherwise(distill, material, tmp_path, monkeypatch, capsys):
    run(distill, monkeypatch, material, tmp_path, "--steps", "2")
    for settings, complaint in (
        ((), "holds checkpoint-2 of another run: add --resume to go on from it, or give another folder."),
        (("--resume", "--seed", "1"), "the run began with steps 2 and not 4: --resume needs the same."),
    ):
        with pytest.raises(SystemExit):
            run(distill, monkeypatch, material, tmp_path, *settings)
        assert complaint in capsys.readouterr().err


def test_only_what_was_asked_for_is_trained(distill, material, tmp_path, monkeypatch, capsys):
    before = load_file(material / "made" / "model.safetensors")
    for trained, parts in (("attention", ("global_kv", "cross_attn")), ("cross", ("global_kv", "cross_decoder"))):
        run(distill, monkeypatch, material, tmp_path / trained, "--train", trained, "--steps", "2")
        after = load_file(tmp_path / trained / "model.safetensors")
        moved = {name for name in before if not torch.equal(after[name], before[name]) and "norm" not in name}
        assert moved == {name for name in before if any(part in name for part in parts) and "norm" not in name}


def test_operations_of_a_step_are_those_that_torch_counts(distill, material):
    """Attention aside, of which torch counts masked products as well."""
    models = {name: AutoModelForCausalLM.from_pretrained(material / name) for name in ("llama", "made")}
    ids, counted = torch.arange(48)[None], {}
    for name, model in models.items():
        with FlopCounterMode(display=False) as counter:
            model(ids, use_cache=False).logits.sum()
        products = counter.get_flop_counts()["Global"].items()
        counted[name] = sum(flops for kind, flops in products if "mm" in str(kind) and "bmm" not in str(kind))
    config = models["made"].config
    seen = sum(sizing.flops(config, n) - sizing.flops(config, 0) for n in range(1, 49))
    assert sizing.row_flops(config, 48) == counted["made"] + seen
    llama_attention = 5 * 4 * 4 * 16 * 48 * 49 / 2
    expected = 3 * (counted["made"] + seen) + counted["llama"] + llama_attention
    found = distill.step_flops(models["made"], models["llama"], 48, config.num_iterations)
    assert found == pytest.approx(expected, rel=0.02)  # norms count as matrices, and torch's head is the same


@pytest.mark.parametrize(
    "settings, complaint",
    [
        (["--resume"], "holds no step to resume from"),
        (["--text", "absent.txt"], "absent.txt is not a file that ends in .txt, .jsonl, .parquet"),
        (["--sequence", "5000"], "none to train on: give more"),
        (["--hidden", "1", "--hidden-layers", "4"], "--hidden-layers is 4: 3 of both models correspond"),
        (["--iterations", "1", "3"], "--iterations leaves out 2, with which"),
        (["--sequence", "16"], "rows of 16 tokens stay within the window of 16: nothing would train"),
        (["--batch", "0"], "invalid (int, at least 1) value: '0'"),
        (["--sequence", "7"], "invalid (int, at least 8) value: '7'"),
        (["--temperature", "0"], "invalid (float, at least 0.1) value: '0'"),
        (["--next-token", "5"], "invalid (float, at least 0, at most 1) value: '5'"),
        (["--learning-rate", "nan"], "invalid (float, at least 0) value: 'nan'"),
        (["--precision", "float16"], "float16 needs a GPU: take bfloat16 or float32"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(settings, complaint, distill, material, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run(distill, monkeypatch, material, tmp_path / "healed", *settings)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and last.startswith("distill.py: ") and complaint in last


@pytest.mark.parametrize("source, student", [("llama", "llama"), ("absent", "made"), ("llama", "absent")])
def test_what_is_no_model_is_refused_in_a_line(source, student, distill, material, tmp_path, monkeypatch, capsys):
    command = ["distill.py", material / source, material / student, tmp_path, "--text", material / "text.txt"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    with pytest.raises(SystemExit) as exit:
        distill.main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    named = "of model_type 'llama'" if source == student else "absent"
    assert exit.value.code == 2 and last.startswith("distill.py: ") and named in last
