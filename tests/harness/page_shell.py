"""Runs the blocks of a page as a reader would: in order, in one shell, in a copy of this tree.

A server, by `vllm serve` or `make serve`, is started in the background, and the next command waits until it is healthy.
It stays for the rest of its block and for the next one. Where a page says port 8000, another one is used, a free one.
"""

import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.server import free_port, user_environment
from harness.checkout import ROOT
from harness.commands import commands
from harness.pages import PYTHON, Block

# Not where 8000 is a number of tokens.
PORT = re.compile(r"(?<=:)8000\b|(?<=--port )8000\b|(?<=--port=)8000\b")
BLOCK_S, SERVER_S, END_S = 900, 1800, 60

# In the place of a program that may start a server. `timeout` bounds its life, whatever becomes of this process.
SERVING = """#!/bin/bash
[ "$1" = serve ] || exec "{program}" "$@"
if [ -e "{folder}/server.pid" ]; then
    echo "a server of this block is running: start the next one in a block of its own"
    exit 1
fi
timeout --kill-after=30 {limit_s} "{program}" "$@" {on_port} > "{folder}/server.log" 2>&1 < /dev/null &
echo $! > "{folder}/server.pid"
until curl --silent --fail --output /dev/null http://127.0.0.1:{port}/health; do
    kill -0 $! 2> /dev/null || {{ tail --bytes=5000 "{folder}/server.log"; exit 1; }}
    sleep 0.5
done
"""
# A shell's folder and variables are kept for the next one; -x shows which command it was that failed.
SCRIPT = """set -aeo pipefail
cd "$(cat "{folder}/directory")"
[ ! -f "{folder}/variables" ] || source "{folder}/variables"
trap 'set +x; pwd > "{folder}/directory"; export -p > "{folder}/variables"' EXIT
set -x
{typed}"""


def copy_of_this_tree(folder: Path) -> Path:
    """A clone, with files as they are here, committed or not. Its `.venv` is this one, so make installs nothing."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True, capture_output=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        else:
            (folder / name).unlink(missing_ok=True)
    (folder / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name not in ("serving", "testing"):
            (folder / ".venv" / entry.name).symlink_to(entry)
    # Make compares their times with those of the files that declare what is installed.
    for stamp in ("serving", "testing"):
        (folder / ".venv" / stamp).touch()
    return folder


class PageShell:
    """Of one page. `tree` is where it begins, with the programs in its .venv/bin; `folder` is for its own files."""

    def __init__(self, tree: Path, folder: Path):
        self.folder, self.port = folder, free_port()
        (folder / "directory").write_text(str(tree))
        programs, instead = tree / ".venv" / "bin", folder / "bin"
        instead.mkdir()
        on_port = {"vllm": f"--port {self.port}", "make": f'ARGS+=" --port {self.port}"'}
        for name, program in (("vllm", programs / "vllm"), ("make", shutil.which("make"))):
            text = SERVING.format(
                program=program, limit_s=SERVER_S, on_port=on_port[name], folder=folder, port=self.port
            )
            (instead / name).write_text(text)
            (instead / name).chmod(0o755)
        self.environment = user_environment()
        # The editable package of this environment is that of another tree.
        self.environment |= {
            "PATH": f"{instead}:{programs}:{self.environment['PATH']}",
            "PYTHONPATH": f"{tree}:{self.environment.get('PYTHONPATH', '')}".rstrip(":"),
        }
        self.serves = False

    def run(self, block: Block, limit_s: int = BLOCK_S) -> str | None:
        """None, or what went wrong, with everything that was printed."""
        typed = PORT.sub(str(self.port), block.script)
        served_before = self.serves
        if served_before and starts_server(block):
            self.end_server()
        if block.language in PYTHON:
            (self.folder / "block.py").write_text(typed)
            typed = f'python "{self.folder}/block.py"'
        (self.folder / "block.sh").write_text(SCRIPT.format(folder=self.folder, typed=typed))
        command = ["timeout", "--kill-after=30", str(limit_s), "bash", str(self.folder / "block.sh")]
        with (self.folder / "output").open("w") as output:
            settings = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            code = subprocess.run(command, env=self.environment, **settings).returncode
        self.serves = starts_server(block)
        if served_before and not self.serves:
            self.end_server()
        if code == 0:
            return None
        reason = f"took more than {limit_s} s" if code == 124 else f"ended with {code}"
        printed = (self.folder / "output").read_text(errors="replace")[-5000:]
        return f"{block.where}: {reason}\n{block.script}----- what was run, and what it printed:\n{printed}"

    def end_server(self) -> None:
        file = self.folder / "server.pid"
        if not file.exists():
            return
        with suppress(psutil.NoSuchProcess):
            process, deadline_s = psutil.Process(int(file.read_text())), time.monotonic() + END_S
            if process.name() == "timeout":  # and not another one, which got the number of a server that has ended
                process.terminate()
            while process.name() == "timeout" and process.status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline_s, f"the server, process {process.pid}, does not end"
                time.sleep(0.1)
        file.unlink()

    def __enter__(self) -> "PageShell":
        return self

    def __exit__(self, *raised: object) -> None:
        self.end_server()


def starts_server(block: Block) -> bool:
    """Of a block of shell commands; the names are those that stand-ins are made for."""
    if block.language in PYTHON:
        return False
    return any(words[:2] in (["vllm", "serve"], ["make", "serve"]) for words in commands(block.script))
