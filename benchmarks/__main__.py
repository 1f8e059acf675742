"""The tables and pictures of the README, each in a process of its own.

python -m benchmarks                          all that need no arguments
python -m benchmarks prefill peers            some of them
python -m benchmarks t_sweep --corpus kjv     one with arguments, which --help lists
python -m benchmarks --paper                  those of the paper's 1.3B shape, on a GPU
"""

import subprocess
import sys
from itertools import takewhile

TABLES = ("kv_layout", "scheduling", "prefill", "chunk_size", "compilation", "start_up", "peers", "reference_model")
TABLES += ("serving", "evaluation", "soak", "kernels")
WITH_ARGUMENTS = ("t_sweep", "upcycling", "healing")
OF_PAPER = ("peers",)


def main(words: list[str]) -> None:
    known = TABLES + WITH_ARGUMENTS
    chosen = tuple(takewhile(known.__contains__, words))
    arguments = words[len(chosen) :]
    if not chosen and arguments == ["--paper"]:
        chosen = OF_PAPER
    elif arguments and len(chosen) != 1:
        sys.exit(f"{arguments[0]}: no table, choose from {', '.join(known)}; one at a time where it has arguments.")
    failed = [
        table
        for table in chosen or TABLES
        if subprocess.run([sys.executable, "-m", f"benchmarks.{table}", *arguments]).returncode
    ]
    if failed:
        sys.exit(f"no table from {', '.join(failed)}: see above.")


if __name__ == "__main__":
    main(sys.argv[1:])
