"""The loss of a language model: measured on held-out rows, and drawn over the steps of a run."""

from pathlib import Path

import torch
from transformers import PreTrainedModel


@torch.inference_mode()
def nats(model: PreTrainedModel, rows: list[torch.Tensor]) -> float:
    """Mean negative log-likelihood of a token. `rows` (N,) of token ids; the first of a row is given, not scored."""
    total = 0.0
    for row in rows:
        ids = row[None].to(model.device)
        total += model(ids, labels=ids, use_cache=False).loss.item() * (len(row) - 1)
    return total / sum(len(row) - 1 for row in rows)


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
