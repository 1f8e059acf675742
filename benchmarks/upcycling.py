"""Which source layers make the best start, and what the cross-decoder does with RoPE: loss before and after healing.

    python -m benchmarks upcycling LLAMA prose.txt

Healing is a run of examples/training/distill.py, on the same tokens and with the same settings for all. A model with
T > 1 does more work for each token.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging

from benchmarks.console import progress, publish
from benchmarks.healing import DISTILL
from benchmarks.results import Key, Result
from benchmarks.server import user_environment
from vllm_yocou.checkpoints.calibration import planned_model
from vllm_yocou.checkpoints.llama import Upcycling
from vllm_yocou.checkpoints.plan import plan as plan_of
from vllm_yocou.checkpoints.sources import recognise
from vllm_yocou.checkpoints.write import copy_companions

WINDOW, TOKENS = 128, 256  # W, and tokens of a row
LEARNING_RATE = 5e-4

Choices = dict[str, dict[str, Any]]  # arguments of `save`, by name


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


def save(
    source: Path, folder: Path, iterations: int, scale: float = 1.0, cross_rope: bool = True, **chosen: Any
) -> None:
    """Write what `vllm-yocou upcycle` would; `scale` multiplies what self layers add to x."""
    asked = Upcycling(iterations, WINDOW, cross_rope, **chosen)
    model = planned_model(plan_of(recognise("upcycle", source, asked), folder, dtype="float32"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".self_decoder." in name and ("o_proj" in name or "down_proj" in name):
                parameter.mul_(scale)
    model.save_pretrained(folder)
    copy_companions(source, folder)


def distilled(source: Path, start: Path, text: Path, steps: int, held: int) -> dict[str, Any]:
    """What distill.py reports of `steps` of a row each, as nats of each held-out row."""
    command = [sys.executable, str(DISTILL), str(source), str(start), str(start / "healed"), "--text", str(text)]
    command += ["--steps", str(steps), "--every", str(steps), "--accumulate", "1", "--sequence", str(TOKENS)]
    command += ["--learning-rate", str(LEARNING_RATE), "--held-out", str(held)]
    subprocess.run(command, env=user_environment(), stdout=sys.stderr, check=True)
    return json.loads((start / "healed" / "distillation.json").read_text())


def measure(source: Path, text: Path, steps: int, held: int) -> Result:
    """Losses of every held-out row."""
    logging.disable_progress_bar()
    sizes: dict[str, Any] = dict(source=source.name, row=TOKENS, window=WINDOW, dtype="float32")
    result = Result.here("upcycling", **sizes, steps=steps, learning_rate=LEARNING_RATE)
    healed, started = choices(AutoConfig.from_pretrained(source).num_hidden_layers)
    for name, choice in (healed | started).items():
        progress(name)
        with tempfile.TemporaryDirectory() as temporary:
            start, T = Path(temporary) / "start", choice.get("iterations", 1)
            settings: dict[str, Any] = {"iterations": 1} | choice
            save(source, start, **settings)
            config = AutoConfig.from_pretrained(start)
            # Of a start that is not healed, only what the report says of the time before its step counts.
            report = distilled(source, start, text, steps if name in healed else 1, held)
            nats = report["held_out_nats"]
        if not result.measurements:
            if len(nats["source"][""]) < held:
                sys.exit(f"the text has {len(nats['source'][''])} rows to hold out, {held} are wanted: give more text.")
            result.settings["held_out_tokens"] = report["held_out_tokens"]
            result.add("loss of the source", "nats", nats["source"][""], start="the source itself")
        layers = f"{config.num_self_decoder_layers} + {config.num_cross_decoder_layers}"
        of: dict[str, Key] = {"start": name, "S + C": layers, "T": T}
        result.add("loss at the start", "nats", nats["before"][str(T)], **of)
        if name in healed:
            result.add("loss healed", "nats", nats["after"][str(T)], **of)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("text", type=Path, help="a text file, whose every twentieth row is held out")
    parser.add_argument("--steps", type=int, default=32, help="of one row each")
    parser.add_argument("--held-out", type=int, default=8, help="rows")
    arguments = parser.parse_args()
    publish(measure(arguments.source, arguments.text, arguments.steps, arguments.held_out))


if __name__ == "__main__":
    main()
