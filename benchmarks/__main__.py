"""`python -m benchmarks [TABLE ...]`: each table in a process of its own, by default all of them."""

import subprocess
import sys

TABLES = ("kv_layout", "scheduling", "prefill", "chunk_size", "compilation", "start_up", "kernels")

if __name__ == "__main__":
    chosen = sys.argv[1:] or TABLES
    if unknown := set(chosen) - set(TABLES):
        sys.exit(f"no table is called {', '.join(sorted(unknown))}: choose from {', '.join(TABLES)}.")
    for table in chosen:
        subprocess.run([sys.executable, "-m", f"benchmarks.{table}"], check=True)
