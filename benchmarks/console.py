"""Of what a table's process writes, only progress lines and sentences reach the person who started it.

`python -m benchmarks` gives the process a log as its standard output and standard error, into which vLLM, its engines
and torch write as they like. For `progress` the process gets the person's standard error under another number.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import render
from benchmarks.results import Result

PROGRESS = "YOCOU_BENCHMARKS_PROGRESS"  # number of the open file that progress lines go to
SAVED = "YOCOU_BENCHMARKS_SAVED"  # file that the path of the result is written into
TAIL = 100  # lines of a failed table's log that are shown


def progress(line: str) -> None:
    """A line for the person who waits."""
    descriptor = os.environ.get(PROGRESS)
    if descriptor is None:
        print(line, file=sys.stderr, flush=True)
    else:
        os.write(int(descriptor), f"{line}\n".encode())


def publish(result: Result) -> None:
    """Keep the result of a table's process, and print it unless the process that started this one does."""
    path = result.save()
    saved = os.environ.get(SAVED)
    if saved is None:
        print(render.section(result))
    else:
        Path(saved).write_text(str(path))


def run(name: str, command: list[str]) -> bool:
    """Run a table's module in a process of its own and print the table; False, after its log, where it failed."""
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="yocou-bench-") as folder:
        log, saved = Path(folder) / "log", Path(folder) / "saved"
        descriptor = os.dup(sys.stderr.fileno())
        with log.open("wb") as out:
            code = subprocess.run(
                [sys.executable, "-m", *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {PROGRESS: str(descriptor), SAVED: str(saved)},
                pass_fds=[descriptor],
            ).returncode
        os.close(descriptor)
        path = Path(saved.read_text()) if saved.exists() else None
        if path is not None:
            print(f"\n### {name}\n\n{render.section(Result.load(path))}", flush=True)
            progress(f"{name}: {time.monotonic() - start_s:.0f} s, kept in {path}")
        if code:
            lines = log.read_text(errors="replace").splitlines()
            progress("\n".join(lines[-TAIL:]))
            progress(f"{name}: failed with exit code {code}; above are the last lines of its log.")
        return not code
