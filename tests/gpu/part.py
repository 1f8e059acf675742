"""One question to a GPU: a command that answers it, how long it may take, and what its output means.

A command has a process of its own: an illegal memory access ends every later use of CUDA in the same one.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

LAST_LINES = 15
WORTH_BEGINNING_S = 10


@dataclass(frozen=True)
class Verdict:
    """Whether a part holds, and what is to be read of it."""

    holds: bool
    text: str


@dataclass(frozen=True)
class Part:
    """A part of the tier.

    Attributes:
        name: what it asks; its files are named after it.
        command: without one, the part is left out.
        limit_s: seconds after which it is cut.
        environment: what it sets beside the caller's.
        read: makes a verdict of what the command wrote to standard output; the exit code must be 0 as well.
        why_not: the reason, where it is left out.
    """

    name: str
    command: tuple[str, ...] = ()
    limit_s: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[str], Verdict] = lambda written: Verdict(True, last_line(written))
    why_not: str = ""

    @property
    def slug(self) -> str:
        kept = "".join(letter if letter.isalnum() else " " for letter in self.name.lower())
        return "-".join(kept.split())


@dataclass(frozen=True)
class Outcome:
    """What became of a part; `holds` is None where it was left out."""

    name: str
    holds: bool | None
    text: str
    seconds: float = 0.0

    def line(self) -> str:
        sign = {True: "holds", False: "FAILS", None: "left out"}[self.holds]
        took = f" ({self.seconds:.0f} s)" if self.seconds else ""
        return f"{sign:8} {self.name}{took}: {self.text}"


def run(part: Part, folder: Path, remaining_s: float) -> Outcome:
    """Ask the part; what it writes is kept in `folder`, as <slug>.out and <slug>.err."""
    if not part.command:
        return Outcome(part.name, None, part.why_not)
    if remaining_s < WORTH_BEGINNING_S:
        return Outcome(part.name, False, "not asked, the time is over")
    began_s, limit_s = time.monotonic(), min(part.limit_s, remaining_s)
    out, err = (folder / f"{part.slug}.{kind}" for kind in ("out", "err"))
    with out.open("w") as to_out, err.open("w") as to_err:
        process = subprocess.Popen(
            part.command,
            stdout=to_out,
            stderr=to_err,
            env=os.environ | part.environment,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process.pid)  # its workers, too, whatever became of it
            process.wait()
    seconds, written = time.monotonic() - began_s, out.read_text(errors="replace")
    verdict = read_verdict(part, written)
    if code is None:
        return Outcome(part.name, False, f"cut after {limit_s:.0f} s; {verdict.text or tail(err, out)}", seconds)
    if code == 0 and verdict.holds:
        return Outcome(part.name, True, verdict.text, seconds)
    said = verdict.text if verdict.text and not verdict.holds else tail(err, out)
    return Outcome(part.name, False, f"exit code {code}; {said}", seconds)


def read_verdict(part: Part, written: str) -> Verdict:
    try:
        return part.read(written)
    except Exception:  # a command that failed wrote something else, a part of it, or nothing
        return Verdict(False, "")


def end_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def tail(*files: Path) -> str:
    """The last lines of the first file that has any."""
    for file in files:
        if lines := [line for line in file.read_text(errors="replace").splitlines() if line.strip()]:
            return f"the end of {file.name}:\n" + "\n".join(f"    {line}" for line in lines[-LAST_LINES:])
    return "it wrote nothing"
