"""The closed-form start: each regression is the best one, and an upcycled model follows its source more closely."""

import shutil
from dataclasses import replace

import pytest
import torch
from harness import llamas
from torch.nn.functional import kl_div
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from vllm_yocou.checkpoints.calibration import REFITTED, Calibration, calibrated, fit, planned_model, ridge_regression
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


@pytest.fixture(scope="module")
def rows():
    """Rows to fit on, and rows to look at."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (20, ASKED.row), generator=generator)
    return ids[:16], ids[16:]


def made(material, destination, iterations=1, **chosen):
    """A plan, its layers, and the model that it writes."""
    source = recognise("upcycle", material / "llama", Upcycling(iterations, 16, **chosen))
    plan = plan_of(source, destination, "float32")
    return plan, source.layers, planned_model(plan)


@torch.inference_mode()
def divergence(model, source, rows_RN) -> float:
    """Nats a token, of the model from its source."""
    ours, theirs = (it(rows_RN).logits.log_softmax(-1).flatten(0, 1) for it in (model, source))
    return kl_div(ours, theirs, reduction="batchmean", log_target=True).item()


def cross_from(layers, config) -> list[int]:
    return [feed_forward for *_, feed_forward in layers[config.num_self_decoder_layers + 1 :]]


@pytest.mark.parametrize("ridge", [0.0, 0.1, 3.0])
def test_no_other_matrix_is_better(ridge):
    """Against a solver of least squares, over the rows and those that draw the weights."""
    torch.manual_seed(0)
    x_MI, y_MO, start_OI = torch.randn(60, 7), torch.randn(60, 5), torch.randn(5, 7)
    found = ridge_regression(x_MI, y_MO, start_OI, ridge)
    pull = (ridge * x_MI.square().sum() / 7).sqrt()
    x, y = torch.cat([x_MI, pull * torch.eye(7)]), torch.cat([y_MO, pull * start_OI.T])
    torch.testing.assert_close(found, torch.linalg.lstsq(x, y).solution.T, atol=1e-5, rtol=1e-5)
    far = ridge_regression(x_MI, y_MO, start_OI, 1e9)
    torch.testing.assert_close(far, start_OI, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("iterations, global_kv", [(1, False), (2, True), (3, False)])
def test_the_model_follows_its_source_more_closely(iterations, global_kv, material, rows, tmp_path):
    training, held_out = rows
    plan, layers, model = made(material, tmp_path / "made", iterations, self_layers=2)
    source = LlamaForCausalLM.from_pretrained(material / "llama").eval()
    before, weights = divergence(model, source, held_out), {k: v.clone() for k, v in model.state_dict().items()}
    shares = []
    asked = replace(ASKED, global_kv=global_kv)
    changed = fit(model, source, layers[2][1], cross_from(layers, plan.config), training, asked, shares.append)
    assert divergence(model, source, held_out) < 0.99 * before
    assert shares == sorted(shares) and shares[-1] == 1
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])}
    ends = ("cross_attn.o_proj.weight", "mlp.down_proj.weight", "global_kv.k_proj.weight", "global_kv.v_proj.weight")
    counts = [sum(name.endswith(end) for name in moved) for end in ends]
    assert moved == set(changed) and counts == [3, 3, int(global_kv), int(global_kv)]


def test_what_is_right_already_stays(material, rows, tmp_path):
    """With one cross layer, one pass and a window over every row the model is the Llama."""
    plan, layers, model = made(material, tmp_path / "made", self_layers=4)
    model.config.sliding_window = ASKED.row
    source = LlamaForCausalLM.from_pretrained(material / "llama").eval()
    fit(model, source, layers[4][1], cross_from(layers, plan.config), rows[0], replace(ASKED, ridge=1e-3))
    assert divergence(model, source, rows[1]) < 1e-6


def test_a_plan_has_what_was_fitted(material, tmp_path):
    asked = replace(ASKED, text=material / "text.txt")
    plan, layers, _ = made(material, tmp_path / "made", 2, self_layers=2)
    one, other = (calibrated(plan, layers, asked, lambda share: None) for _ in range(2))
    refitted = [step.target for step in one.steps if step.change == REFITTED]
    assert len(refitted) == 2 * 3
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
    assert CliRunner().invoke(app, command).exit_code == 0
    model = YocoUForCausalLM.from_pretrained(tmp_path / "made")
    plan, _, _ = made(tmp_path, tmp_path / "copied", 2)
    same = [torch.equal(model.state_dict()[step.target], step.tensor.read().bfloat16()) for step in plan.steps]
    assert same.count(False) == 2 * plan.config.num_cross_decoder_layers
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
