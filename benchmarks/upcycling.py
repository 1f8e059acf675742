"""Which source layers make the best start, and what the cross-decoder does with RoPE: loss before and after healing.

    python -m benchmarks upcycling LLAMA prose.txt

Healing is distillation from the source, on the same tokens and with the same settings for all. A model with T > 1 does
more work for each token.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.console import progress, publish
from benchmarks.results import Key, Result
from vllm_yocou.checkpoints.calibration import planned_model
from vllm_yocou.checkpoints.llama import Upcycling
from vllm_yocou.checkpoints.plan import plan as plan_of
from vllm_yocou.checkpoints.sources import recognise
from vllm_yocou.reference import YocoUForCausalLM

WINDOW, TOKENS = 128, 256  # W, and tokens of a row
WARMUP = 4  # steps
LEARNING_RATE = 5e-4
NEXT_TOKEN = 0.1  # weight of the next-token loss; the rest is that of the divergence from the source

Choices = dict[str, dict[str, Any]]  # arguments of `build`, by name


def choices(layers: int) -> tuple[Choices, Choices]:
    """The choices that are compared for a source of so many layers: those to heal, and those only to initialise."""
    half, default = layers // 2, "the boundary layer's, RoPE"
    own: dict[str, Any] = dict(self_layers=half, attention_from=range(half, layers))
    healed: Choices = {
        f"{default} (the default)": dict(self_layers=half),
        "each layer's own, RoPE": own,
        "the boundary layer's, NoPE": dict(self_layers=half, cross_rope=False),
        f"{default}, S two thirds": dict(self_layers=2 * layers // 3),
        f"{default}, T = 2": dict(self_layers=half, iterations=2),
        f"{default}, T = 3": dict(self_layers=half, iterations=3),
    }
    started: Choices = {
        "each layer's own, NoPE": own | dict(cross_rope=False),
        f"{default}, every second cross layer": dict(self_layers=half, cross_from=range(half, layers, 2)),
        f"{default}, every second self layer": dict(self_from=range(0, half, 2), cross_from=range(half, layers)),
        f"{default}, T = 2, self layers scaled by 1/2": dict(self_layers=half, iterations=2, scale=1 / 2),
        f"{default}, T = 2, S a quarter": dict(self_layers=layers // 4, iterations=2),
    }
    return healed, started


def build(
    source: Path, iterations: int = 1, cross_rope: bool = True, scale: float = 1.0, **chosen: Any
) -> YocoUForCausalLM:
    """What `vllm-yocou upcycle` would write, without writing it; `scale` multiplies what self layers add to x."""
    asked = Upcycling(iterations, WINDOW, cross_rope, **chosen)
    plan = plan_of(recognise("upcycle", source, asked), source / "nowhere", dtype="float32")
    model = planned_model(plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".self_decoder." in name and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(scale)
    return model


@torch.inference_mode()
def nats(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Next-token loss of each of the rows (R, N), as (R,)."""
    return torch.tensor([model(row[None], labels=row[None], use_cache=False).loss.item() for row in rows])


def heal(model: YocoUForCausalLM, rows: torch.Tensor, taught: list[torch.Tensor]) -> None:
    """One step for each row (R, N), towards the source's log-probabilities (N, vocab_size)."""
    model.train()
    settings: dict[str, Any] = dict(lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    for row, theirs in zip(rows, taught, strict=True):
        ours = model(row[None], use_cache=False).logits[0].log_softmax(-1)
        divergence = kl_div(ours, theirs.float(), reduction="batchmean", log_target=True)
        loss = (1 - NEXT_TOKEN) * divergence + NEXT_TOKEN * cross_entropy(ours[:-1], row[1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def split(source: Path, text: Path, steps: int, held: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows for training (steps, TOKENS) and rows held out (held, TOKENS), both from all over the text."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    if len(rows) < steps + held:
        sys.exit(f"the text has {len(rows)} rows of {TOKENS} tokens, {steps + held} are wanted: give more text.")
    rows = rows[torch.linspace(0, len(rows) - 1, steps + held).long()]
    is_held_out = torch.zeros(len(rows), dtype=torch.bool)
    is_held_out[torch.linspace(1, len(rows) - 2, held).long()] = True
    return rows[~is_held_out], rows[is_held_out]


def measure(source: Path, text: Path, steps: int, held: int) -> Result:
    """Losses of every held-out row."""
    logging.disable_progress_bar()
    training, held_out = split(source, text, steps, held)
    sizes = dict(source=source.name, row=TOKENS, window=WINDOW, dtype="float32", held_out_tokens=held * (TOKENS - 1))
    result = Result.here("upcycling", **sizes, steps=steps, learning_rate=LEARNING_RATE)
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    result.add("loss of the source", "nats", nats(teacher, held_out).tolist(), start="the source itself")
    with torch.inference_mode():
        taught = [teacher(row[None], use_cache=False).logits[0].log_softmax(-1).bfloat16() for row in training]
    healed, started = choices(teacher.config.num_hidden_layers)
    del teacher
    for name, choice in (healed | started).items():
        progress(name)
        model = build(source, **choice)
        cfg = model.config
        layers = f"{cfg.num_self_decoder_layers} + {cfg.num_cross_decoder_layers}"
        of: dict[str, Key] = {"start": name, "S + C": layers, "T": cfg.num_iterations}
        result.add("loss at the start", "nats", nats(model, held_out).tolist(), **of)
        if name in healed:
            heal(model, training, taught)
            result.add("loss healed", "nats", nats(model, held_out).tolist(), **of)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path, help="a text file; rows from all over it are taken")
    parser.add_argument("--steps", type=int, default=32, help="of one row each")
    parser.add_argument("--held-out", type=int, default=8, help="rows")
    arguments = parser.parse_args()
    publish(measure(arguments.source, arguments.text, arguments.steps, arguments.held_out))


if __name__ == "__main__":
    main()
