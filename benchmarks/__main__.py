"""`python -m benchmarks [TABLE ...] [--paper]`: each table in a process of its own, by default all of them.

With `--paper` the tables that have one take the paper's 1.3B shape, for a GPU.
"""

import subprocess
import sys

TABLES = ("kv_layout", "scheduling", "prefill", "chunk_size", "compilation", "start_up", "peers", "reference_model")
TABLES += ("serving", "kernels")
OF_PAPER = ("peers",)

if __name__ == "__main__":
    paper, chosen = "--paper" in sys.argv, [name for name in sys.argv[1:] if name != "--paper"]
    known = OF_PAPER if paper else TABLES
    if unknown := set(chosen) - set(known):
        sys.exit(f"{', '.join(sorted(unknown))}: no table{' with --paper' * paper}, choose from {', '.join(known)}.")
    for table in chosen or known:
        subprocess.run([sys.executable, "-m", f"benchmarks.{table}", *["--paper"] * paper], check=True)
