"""A plan and a command of which some weights are fitted, and what cannot be fitted."""

import shutil
from dataclasses import replace

import pytest
import torch
from harness import llamas
from typer.testing import CliRunner

from vllm_yocou.checkpoints.calibration import REFITTED, Calibration, calibrated, planned_model
from vllm_yocou.checkpoints.llama import Upcycling
from vllm_yocou.checkpoints.plan import plan as plan_of
from vllm_yocou.checkpoints.sources import recognise
from vllm_yocou.cli.command_line import app
from vllm_yocou.reference import YocoUForCausalLM

ASKED = Calibration(text=None, tokens=480, row=48)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    llamas.save_material(folder)
    return folder


def made(material, destination, iterations=1, **chosen):
    """A plan, its layers, and the model that it writes."""
    source = recognise("upcycle", material / "llama", Upcycling(iterations, 16, **chosen))
    plan = plan_of(source, destination, "float32")
    return plan, source.layers, planned_model(plan)


def test_a_plan_has_what_was_fitted(material, tmp_path):
    asked = replace(ASKED, text=material / "text.txt", iterations=[1, 2])
    plan, layers, _ = made(material, tmp_path / "made", 2, self_layers=2)
    one, other = (calibrated(plan, layers, asked, lambda share: None) for _ in range(2))
    refitted = [step.target for step in one.steps if step.change == REFITTED]
    assert len(refitted) == 2 * 2 + 2 * 3  # of self and of cross layers
    for step, again, copied in zip(one.steps, other.steps, plan.steps, strict=True):
        assert torch.equal(step.tensor.read(), again.tensor.read())
        assert (step.target in refitted) != torch.equal(step.tensor.read(), copied.tensor.read())


@pytest.mark.parametrize(
    "text, complaint",
    [
        (b"too little", r"has \d+ tokens and calibration takes 480: give more text"),
        ("Größe".encode("latin-1") * 999, "is not text in UTF-8: give a file of prose"),
    ],
    ids=["short", "latin"],
)
def test_text_that_cannot_be_taken_is_refused(text, complaint, material, tmp_path):
    (tmp_path / "prose.txt").write_bytes(text)
    plan, layers, _ = made(material, tmp_path / "made", self_layers=2)
    with pytest.raises(ValueError, match=complaint):
        calibrated(plan, layers, replace(ASKED, text=tmp_path / "prose.txt"), lambda share: None)


def test_a_source_without_a_tokenizer_is_refused(material, tmp_path):
    llamas.save_llama(tmp_path / "llama")
    plan, layers, _ = made(tmp_path, tmp_path / "made", self_layers=2)
    with pytest.raises(ValueError, match=r"calibration needs the tokenizer of .*llama, which does not load"):
        calibrated(plan, layers, replace(ASKED, text=material / "text.txt"), lambda share: None)


@pytest.mark.parametrize("cross_from", [(4, 4), (2, 3), (4, 3)])
def test_layers_that_do_not_follow_the_stream_to_its_end_are_refused(cross_from, material, tmp_path):
    plan, layers, _ = made(material, tmp_path / "made", self_layers=2, cross_from=cross_from)
    with pytest.raises(ValueError, match=r"--calibrate cannot be used with cross layers .* that end with 4\."):
        calibrated(plan, layers, replace(ASKED, text=material / "text.txt"), lambda share: None)


@pytest.mark.parametrize(
    "iterations, complaint",
    [
        ([0, 2], r"is \[0, 2\]: it must be a list of whole numbers between 1 and 4096"),
        ([1, 3], "leaves out 2, the T of"),
    ],
)
def test_iterations_that_the_model_does_not_have_are_refused(iterations, complaint, material, tmp_path):
    plan, layers, _ = made(material, tmp_path / "made", 2, self_layers=2)
    with pytest.raises(ValueError, match=f"--calibration-iterations {complaint}"):
        calibrated(plan, layers, replace(ASKED, iterations=iterations), lambda share: None)


def test_the_command_writes_what_was_fitted(material, tmp_path, capsys):
    """A tied source, stored in bfloat16."""
    source = tmp_path / "llama"
    llamas.save_llama(source, vocab_size=300, tie_word_embeddings=True)
    for file in (material / "llama").glob("tokenizer*"):
        shutil.copy(file, source)
    command = [
        "upcycle",
        str(source),
        str(tmp_path / "made"),
        "--iterations",
        "2",
        "--window",
        "16",
        "--dtype",
        "bfloat16",
    ]
    command += ["--calibrate", str(material / "text.txt"), "--calibration-tokens", "1024"]
    command += ["--calibration-iterations", "1-3"]
    assert CliRunner().invoke(app, command).exit_code == 0
    model = YocoUForCausalLM.from_pretrained(tmp_path / "made")
    plan, _, _ = made(tmp_path, tmp_path / "copied", 2)
    same = [torch.equal(model.state_dict()[step.target], step.tensor.read().bfloat16()) for step in plan.steps]
    assert same.count(False) == 2 * plan.config.num_hidden_layers  # for several T, or else of cross layers alone
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
