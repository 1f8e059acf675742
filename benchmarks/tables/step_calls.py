"""What the calls of a decode step cost."""

from typing import Any

from benchmarks.results import Result
from benchmarks.tables.table import Rows, Table, cell

OPERATION, UNIT = "an operation of the plugin's, empty", "a unit of compiled code, empty"
WRITE, ATTEND = "write of keys and values", "attention over a window"
NARROW: dict[str, Any] = dict(hidden_size=64, intermediate_size=64, vocab_size=256)


def rows(result: Result) -> Rows:
    """The fastest repeat of each call: others were interrupted."""
    lines = []
    for call in result.keys("call"):
        us, often = min(result.runs("call", call=call)), result.median("calls", call=call) or 0
        lines.append([call, cell(us, ".1f", " us"), cell(often, ".0f"), cell(us * often / 1e3, ".2f", " ms")])
    return ["call", "takes", "times a step", "of a step"], lines


def note(result: Result) -> str:
    settings = result.settings
    return (
        f"As deep as the {settings['shape']} shape and {NARROW['hidden_size']} wide, float32, one request of "
        f"{settings['context']} tokens, {settings['threads']} threads; the fastest of {settings['repeats']} repeats of "
        f"{settings['calls']} calls. An operation contains the look-ups above it. Writes and attention include their "
        "native part; the lines that say vLLM's are what the plugin would call if it did not keep the views of a cache."
    )


TABLES = (
    Table(
        name="step_calls",
        about="What a decode step's calls cost in Python and dispatch",
        needs="two quiet cores, a C++ compiler",
        takes="1 minute",
        rows=rows,
        note=note,
    ),
)
