"""How long the slowest requests wait, rows skipping or not."""

from benchmarks.results import Result
from benchmarks.tables.table import Rows, Table, cell, over

SKIPPING, EVERY_ROW = "skipping", "every row"
WAYS = {SKIPPING: True, EVERY_ROW: False}
PERCENTILES = (50, 95, 99)
WAITS = ("first token", "between tokens")


def rows(result: Result) -> Rows:
    """A percentile of skipping has its ratio to that of every row."""
    lines = []
    for chunk in result.keys("chunk"):
        for way in WAYS:
            cells = []
            for wait in WAITS:
                for percentile in PERCENTILES:
                    name = f"{wait}, p{percentile}"
                    here = result.median(name, chunk=chunk, way=way)
                    base = result.median(name, chunk=chunk, way=EVERY_ROW)
                    times = cell(over(here, base), ".2f", "x") if way == SKIPPING else ""
                    cells.append(f"{cell(over(here, 1e-3), ',.0f', ' ms')} {f'({times})' if times else ''}".strip())
            rate = cell(result.median("requests", chunk=chunk, way=way), ".2f")
            lines.append([f"{chunk:,}", way, rate, *cells, cell(result.median("answers", chunk=chunk, way=way), ".1f")])
    header = ["tokens of a step", "rows", "requests/s"]
    header += [f"{wait}, p{percentile}" for wait in WAITS for percentile in PERCENTILES]
    return [*header, "tokens of answers/s"], lines


def note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['shape']} shape, random weights, {settings['dtype']}, compiled, by `vllm bench serve`: "
        f"{settings['rounds']} interleaved rounds of {settings['requests']} requests, at {settings['load']} times the "
        f"rate that the server that runs every row can keep up. Prompts of {settings['prompt']:,} tokens, answers of "
        f"{settings['answer']}. In brackets the ratio to every row."
    )


TABLES = (
    Table(
        name="tail_latency",
        about="How long the slowest requests wait near saturation, rows skipping or not, by size of chunks",
        needs="two quiet cores, 20 GiB of memory, a C++ compiler",
        takes="an hour",
        by_default=False,
        rows=rows,
        note=note,
    ),
)
