"""Ask one GPU everything, in an environment that has vLLM and torch; nothing is installed. `make gpu`, `make gpu-all`.

    python -m gpu [--all] [--results DIR]

Each part prints its verdict as it ends, so that a run that is cut still tells. The exit code is 0 where every part that
was asked holds. Without a GPU it is a rehearsal of itself on the CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.results import ROOT
from gpu import parts
from gpu.part import Outcome, Part, run
from vllm_yocou import __version__
from vllm_yocou.cli import environment


def announce_plugin(folder: Path) -> None:
    """Let vLLM find this tree's plugin in all processes that follow, whether or not one is installed.

    As an installation does, it puts kernels/ into the package. Python would look into the working directory first,
    where the package has none: PYTHONSAFEPATH leaves that out.
    """
    (points,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"].items()
    group, names = points
    metadata = folder / f"vllm_yocou-{__version__}.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-yocou\nVersion: {__version__}\n")
    lines = [f"[{group}]", *(f"{name} = {place}" for name, place in names.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    package = folder / "vllm_yocou"
    package.mkdir(exist_ok=True)
    for part in [*(ROOT / "vllm_yocou").iterdir(), ROOT / "kernels"]:
        link = package / part.name
        link.unlink(missing_ok=True)
        link.symlink_to(part)
    paths = [str(folder), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["PYTHONSAFEPATH"] = "1"


def usable_gpus() -> int:
    """How many torch may use, which a variable can make fewer than there are; CUDA stays unused in this process."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def ask(asked: Iterable[Part], folder: Path, patience: int, limit_s: float) -> list[Outcome]:
    """Ask one part after the other, each for `patience` times its limit, all of them for `limit_s`."""
    began_s, outcomes = time.monotonic(), []
    for part in asked:
        given = replace(part, limit_s=patience * part.limit_s)
        outcomes.append(run(given, folder, limit_s - (time.monotonic() - began_s)))
        print(outcomes[-1].line(), flush=True)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also what takes longer than eight minutes")
    parser.add_argument("--results", type=Path, help="folder for logs and results, by default a temporary one")
    chosen = parser.parse_args(arguments)
    folder = (chosen.results or Path(tempfile.mkdtemp(prefix="yocou-gpu-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    machine, gpus = environment.describe(), usable_gpus()
    announce_plugin(folder / "plugin")
    os.chdir(ROOT)
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    found = f"{gpus} of {', '.join(machine['platform']['gpus'])}" if gpus else "No GPU: a rehearsal on the CPU"
    print(f"{found}; {versions}; logs in {folder}", flush=True)
    began_s = time.monotonic()
    patience = 1 if gpus else parts.PATIENCE
    outcomes = ask(parts.quick(gpus, folder), folder, patience, patience * parts.LIMIT_S)
    if chosen.all:
        outcomes += ask(parts.more(gpus, folder), folder, patience, float("inf"))
    (folder / "tier.json").write_text(
        json.dumps(dict(machine=machine, parts=[asdict(it) for it in outcomes]), indent=1)
    )
    failed = [outcome.name for outcome in outcomes if outcome.holds is False]
    seconds = time.monotonic() - began_s
    print(f"{len(failed)} of {len(outcomes)} parts failed" if failed else "every part holds", f"({seconds:.0f} s).")
    if not gpus:
        print("This was a rehearsal: it says nothing of a GPU.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
