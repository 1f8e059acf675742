"""Two minutes of a GPU's speed: prompts and decode steps of 8K and 64K tokens, of YOCO-U and then of a Transformer.

One engine takes both, one model at a time, and the result is kept after each, so that a run that is cut still tells.
"""

from benchmarks.engine import core, start, stop

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.console import progress, publish
from benchmarks.gpu import STEPS, K, decode, prefill
from benchmarks.peers import MARGIN, Sizes, described, peers
from benchmarks.results import Result
from benchmarks.tables.comparisons import LIKE_PAPER, OURS

FULL = Sizes("gpu_speed", "paper 1.3B", "bfloat16", {8 * K: 5, 64 * K: 2}, (1, 32), 8 * K, 0, {})
TINY = Sizes("gpu_speed", "yoco-u-kjv", "float32", {40: 2, 200: 1}, (1, 2), 200, 0, {})


def measure(sizes: Sizes, keep: Callable[[Result], object] = publish) -> Result:
    those = peers(sizes)
    named = described(sizes) | dict(chunks={}, steps=STEPS)
    del named["budget_gib"]
    result = Result.here(sizes.table, **named)
    common: dict[str, Any] = dict(dtype=sizes.dtype, enforce_eager=not torch.cuda.is_available())
    common |= dict(max_model_len=max(sizes.prompts) + MARGIN, max_num_seqs=max(sizes.batches))
    for name in (OURS, LIKE_PAPER):
        progress(f"starting {name}")
        cfg, room = those[name]
        llm = start(cfg, **common | room)
        result.settings["chunks"][name] = core(llm).scheduler.max_num_scheduled_tokens
        prefill(llm, name, sizes, result)
        decode(llm, name, sizes, result)
        stop(llm)
        keep(result)
        del llm
        gc.collect()  # nothing refers to the engine any more, and the next one needs its memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tiny", action="store_true", help="rehearse on a tiny shape in float32; needs no GPU, and --to"
    )
    parser.add_argument(
        "--to", type=Path, help="file to keep the result in, instead of one that pages are rendered from"
    )
    arguments = parser.parse_args()
    if arguments.tiny and arguments.to is None:
        parser.error("a rehearsal is no result of this machine: name a file with --to.")
    if not arguments.tiny and not torch.cuda.is_available():
        parser.exit(2, "gpu_speed needs a GPU, and torch finds none on this machine.\n")
    keep = publish if arguments.to is None else lambda result: result.save(arguments.to)
    measure(TINY if arguments.tiny else FULL, keep)


if __name__ == "__main__":
    main()
