"""Which source layers make the best start, and what the cross-decoder does with RoPE: loss before and after healing.

    python -m benchmarks.upcycling LLAMA prose.txt

Healing is distillation from the source, on the same tokens and with the same settings for all. A model with T > 1 does
more work for each token.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.table import print_table
from vllm_yocou.checkpoints import upcycling
from vllm_yocou.reference import YocoUForCausalLM

WINDOW, TOKENS = 128, 256  # W, and tokens of a row
WARMUP = 4  # steps
LEARNING_RATE = 5e-4
NEXT_TOKEN = 0.1  # weight of the next-token loss beside the divergence from the source


def choices(layers: int) -> tuple[dict[str, dict], dict[str, dict]]:
    """What is compared, for a source of this many layers: what is healed, and what is only started."""
    half = layers // 2
    own = dict(self_layers=half, attention_from=range(half, layers))
    healed = {
        "attention of the boundary, RoPE": dict(self_layers=half),
        "attention of their own, RoPE": own,
        "attention of the boundary, NoPE": dict(self_layers=half, cross_rope=False),
        "the same, RoPE, S two thirds": dict(self_layers=2 * layers // 3),
        "the same, RoPE, T = 2": dict(self_layers=half, iterations=2),
        "the same, RoPE, T = 3": dict(self_layers=half, iterations=3),
    }
    started = {
        "attention of their own, NoPE": own | dict(cross_rope=False),
        "of the boundary, RoPE, C every second layer": dict(self_layers=half, cross_from=range(half, layers, 2)),
        "the same, S every second layer": dict(self_from=range(0, half, 2), cross_from=range(half, layers)),
        "the same, T = 2, self layers add half": dict(self_layers=half, iterations=2, scale=1 / 2),
        "the same, T = 2, S a quarter": dict(self_layers=layers // 4, iterations=2),
    }
    return healed, started


def build(source: Path, iterations: int = 1, cross_rope: bool = True, scale: float = 1.0, **chosen) -> YocoUForCausalLM:
    """What `vllm-yocou upcycle` would write, without writing it; `scale` multiplies what self layers add to x."""
    nowhere = source / "nowhere"
    plan, _ = upcycling.plan(
        source, nowhere, iterations=iterations, window=WINDOW, cross_rope=cross_rope, dtype="float32", **chosen
    )
    weights = {}
    for step in plan.steps:
        branch = ".self_decoder." in step.target and ("o_proj" in step.target or "down_proj" in step.target)
        weights[step.target] = step.tensor.read().float() * (scale if branch else 1.0)
    model = YocoUForCausalLM(plan.config)
    model.load_state_dict(weights, strict=not plan.config.tie_word_embeddings)
    model.tie_weights()
    return model


@torch.inference_mode()
def nats(model, rows: torch.Tensor) -> torch.Tensor:
    """Next-token loss of each of the rows (R, N), as (R,)."""
    return torch.tensor([model(row[None], labels=row[None], use_cache=False).loss.item() for row in rows])


def heal(model: YocoUForCausalLM, rows: torch.Tensor, taught: list[torch.Tensor]) -> None:
    """One step for each row (R, N), towards the source's log-probabilities (N, vocab_size)."""
    model.train()
    settings = dict(lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path, help="a text file; rows from all over it are taken")
    parser.add_argument("--steps", type=int, default=32, help="of one row each")
    parser.add_argument("--held-out", type=int, default=8, help="rows")
    arguments = parser.parse_args()
    steps, held = arguments.steps, arguments.held_out
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(arguments.source)
    ids = torch.tensor(tokenizer(arguments.text.read_text(), add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
    if len(rows) < steps + held:
        parser.error(f"the text has {len(rows)} rows of {TOKENS} tokens, {steps + held} are wanted: give more text.")
    rows = rows[torch.linspace(0, len(rows) - 1, steps + held).long()]
    is_held_out = torch.zeros(len(rows), dtype=torch.bool)
    is_held_out[torch.linspace(1, len(rows) - 2, held).long()] = True
    training, held_out = rows[~is_held_out], rows[is_held_out]

    teacher = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=torch.float32).eval()
    table = [["the source itself", "", "", f"{nats(teacher, held_out).mean():.2f}", "", ""]]
    with torch.inference_mode():
        taught = [teacher(row[None], use_cache=False).logits[0].log_softmax(-1).bfloat16() for row in training]
    healed, started = choices(teacher.config.num_hidden_layers)
    del teacher
    first = None
    for name, choice in (healed | started).items():
        start_s = time.perf_counter()
        model = build(arguments.source, **choice)
        config = model.config
        row = [name, f"{config.num_self_decoder_layers} + {config.num_cross_decoder_layers}", config.num_iterations]
        row.append(f"{nats(model, held_out).mean():.2f}")
        if name in healed:
            heal(model, training, taught)
            after = nats(model, held_out)
            first = after if first is None else first
            error = (after - first).std() / len(after) ** 0.5
            row += [f"{after.mean():.2f}", "" if after is first else f"{(after - first).mean():+.3f} ± {error:.3f}"]
        table.append(row + [""] * (6 - len(row)))
        print(*row, f"{time.perf_counter() - start_s:.0f} s", sep=" | ", file=sys.stderr, flush=True)
    note = f"Rows of {TOKENS} tokens, W = {WINDOW}, float32. Held out: {held * (TOKENS - 1)} tokens. "
    note += (
        f"Healing: {steps} steps of a row ({steps * TOKENS} tokens), AdamW at {LEARNING_RATE}. ±: standard error over "
    )
    note += "the held-out rows."
    header = ["start", "S + C", "T", "nats a token at the start", "after healing", "against the first"]
    print_table("Upcycling", note, header, table)


if __name__ == "__main__":
    main()
