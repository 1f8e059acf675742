"""The loss of a language model: measured on held-out rows, and drawn over the steps of a run."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def row_nats(model: PreTrainedModel, rows: Iterable[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the negative log-likelihoods of each row's labels (R,), and how many these are (R,).

    Args:
        rows: inputs of the model, each of one sequence (1, N) with its labels. -100 marks a token that is not scored,
            and the first one never is.
    """
    sums, labels = [], []
    for row in rows:
        labels.append((row["labels"][:, 1:] != -100).sum().item())
        here = {key: value.to(model.device) for key, value in row.items()}
        sums.append(model(**here, use_cache=False).loss.item() * labels[-1])
    return torch.tensor(sums), torch.tensor(labels)


def nats(model: PreTrainedModel, rows: Iterable[dict[str, torch.Tensor]]) -> float:
    """Mean negative log-likelihood of a label of all `rows`, which are as in `row_nats`."""
    sums_R, labels_R = row_nats(model, rows)
    return (sums_R.sum() / labels_R.sum()).item()


def draw(
    history: list[dict], path: Path, title: str, training: str = "training", levels: dict[str, float] | None = None
) -> None:
    """Curves of a Trainer's `log_history`, `training` naming the first, and a line for each of `levels`, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in (("loss", training), ("eval_loss", "held out")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "eval_loss" else None)
    for label, level in (levels or {}).items():
        axes.axhline(level, label=label, color="grey", linestyle="--")
    axes.set(xlabel="step", ylabel="nats per token", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")
