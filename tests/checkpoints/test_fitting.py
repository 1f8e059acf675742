"""Each regression is the best one, and a fitted model follows its source more closely, after every pass."""

from pathlib import Path

import pytest
import torch
from harness import llamas
from torch.nn.functional import kl_div
from transformers import LlamaForCausalLM

from vllm_yocou.checkpoints.calibration import planned_model
from vllm_yocou.checkpoints.fitting import Fit, Regression, noted
from vllm_yocou.checkpoints.llama import Upcycling
from vllm_yocou.checkpoints.plan import plan as plan_of
from vllm_yocou.checkpoints.sources import recognise

N, S = 48, 2  # tokens of a row, self layers


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    llamas.save_llama(folder, vocab_size=300)
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def rows():
    """Rows to fit on, and rows to look at."""
    ids = torch.randint(0, 300, (20, N), generator=torch.Generator().manual_seed(0))
    return ids[:16], ids[16:]


def made(source, destination, iterations=1, **chosen):
    """A student that was copied, and the source layers that its cross layers follow."""
    asked = Upcycling(iterations, 16, **dict(self_layers=S) | chosen)
    found = recognise("upcycle", Path(source.config._name_or_path), asked)
    return planned_model(plan_of(found, destination, "float32")), [row[2] for row in found.layers if "cross" in row[0]]


@torch.inference_mode()
def divergence(model, source, rows_RN) -> float:
    """Nats a token, of the model from its source."""
    ours, theirs = (it(rows_RN).logits.log_softmax(-1).flatten(0, 1) for it in (model, source))
    return kl_div(ours, theirs, reduction="batchmean", log_target=True).item()


@torch.inference_mode()
def after_passes(model, rows_RN) -> list[torch.Tensor]:
    """The stream (R, N, D) after each pass, and the embeddings before."""
    with noted(model.model.self_decoder.layers[0]) as passes, noted(model.model.cross_decoder.layers[0]) as cross:
        model(rows_RN, use_cache=False)
    return [call.args[0] for call in [*passes, *cross]]


@pytest.mark.parametrize("ridge", [0.0, 0.1, 3.0])
def test_no_other_matrix_is_better(ridge):
    """Against a solver of least squares, over the rows and those that draw the weights."""
    torch.manual_seed(0)
    x_MI, y_MO, start_OI = torch.randn(60, 7), torch.randn(60, 5), torch.randn(5, 7)
    regression = Regression(7, 5)
    for part in (slice(0, 25), slice(25, 60)):
        regression.add(x_MI[part], y_MO[part])
    found = regression.solve(start_OI, ridge)
    pull = (ridge * x_MI.square().sum() / 7).sqrt()
    x, y = torch.cat([x_MI, pull * torch.eye(7)]), torch.cat([y_MO, pull * start_OI.T])
    torch.testing.assert_close(found, torch.linalg.lstsq(x, y).solution.T, atol=1e-5, rtol=1e-5)
    far = regression.solve(start_OI, 1e9)
    torch.testing.assert_close(far, start_OI, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own, iterations", [(1, [1]), (2, [2]), (2, [2, 3])])
def test_the_model_follows_its_source_more_closely(own, iterations, source, rows, tmp_path):
    """On the average of the T that it is fitted for. All that adds to the stream moves, and nothing else."""
    training, held_out = rows
    model, cross_from = made(source, tmp_path / "made", own)

    def mean_divergence() -> float:
        found = []
        for model.config.num_iterations in iterations:
            found.append(divergence(model, source, held_out))
        model.config.num_iterations = own
        return sum(found) / len(found)

    before, weights = mean_divergence(), {name: weight.clone() for name, weight in model.state_dict().items()}
    shares = []
    fit = Fit(model, source, training, shares.append)
    fit.run(cross_from, iterations, ridge=0.1, self_ridge=0.1)
    assert model.config.num_iterations == own and mean_divergence() < 0.99 * before
    assert shares == sorted(shares) and shares[-1] == 1
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])}
    ends = ("self_attn.o_proj.weight", "cross_attn.o_proj.weight", "mlp.down_proj.weight")
    settles = iterations != [own]
    adds = {name for name in weights if name.endswith(ends) and (settles or "cross_decoder" in name)}
    assert moved == set(fit.changed) == adds


def test_further_passes_leave_what_they_are_given(source, rows, tmp_path):
    training, held_out = rows
    model, cross_from = made(source, tmp_path / "made", 3)
    copied = after_passes(model, held_out)
    Fit(model, source, training).run(cross_from, [1, 2, 3], ridge=0.1, self_ridge=0.1)
    fitted = after_passes(model, held_out)

    def distance(a, b) -> float:
        return ((a - b).square().sum() / b.square().sum()).sqrt().item()

    first = copied[1]
    for now, then in zip(fitted[2:], copied[2:], strict=True):
        assert distance(now, first) < 0.7 * distance(then, first)
    assert distance(fitted[1], first) < 0.7 * distance(copied[0], first)


def test_what_is_right_already_stays(source, rows, tmp_path):
    """With one cross layer, one pass and a window over every row the model is the Llama."""
    model, cross_from = made(source, tmp_path / "made", self_layers=4)
    model.config.sliding_window = N
    Fit(model, source, rows[0]).run(cross_from, [1], ridge=1e-3, self_ridge=0.1)
    assert divergence(model, source, rows[1]) < 1e-6
