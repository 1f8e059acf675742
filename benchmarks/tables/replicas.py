"""Batch inference by one replica and by several."""

from benchmarks.results import Result
from benchmarks.tables.table import Rows, Table, cell, over


def rows(result: Result) -> Rows:
    first, *_ = result.keys("replicas")
    lines = []
    for replicas in result.keys("replicas"):
        here, alone = (result.median("answers", replicas=number) for number in (replicas, first))
        lost = [cell(result.median(name, replicas=replicas), ".0f") for name in ("rows lost", "rows doubled")]
        lines.append([replicas, cell(here, ",.0f"), cell(over(here, alone), ".2f", "x"), *lost])
    header = ["replicas", "tokens of answers/s", "this / one replica"]
    return [*header, "rows lost after a kill", "rows doubled after a kill"], lines


def note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['model']}, {settings['dtype']}, compiled, {settings['rows']:,} verses as prompts, answers of at "
        f"most {settings['tokens']} tokens; medians of {settings['rounds']} interleaved runs, from the first file of "
        "answers on. Replicas share the machine's cores evenly. In one more run each, a replica was killed after that "
        "file."
    )


TABLES = (
    Table(
        name="replicas",
        about="Batch inference with one and two replicas on a Ray cluster, and after a kill",
        needs="two quiet cores, 6 GiB of memory, a C++ compiler",
        takes="15 minutes",
        by_default=False,
        rows=rows,
        note=note,
    ),
)
