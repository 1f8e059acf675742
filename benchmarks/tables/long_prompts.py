"""Prompts of up to a million tokens, in YOCO-U and its peers: speed, and bytes of the KV cache."""

from typing import Any

from benchmarks.results import Result
from benchmarks.tables.comparisons import OURS
from benchmarks.tables.table import Rows, Table, cell, over


def speed(result: Result, tokens: int, **of: Any) -> float | None:
    """Tokens/s of a prompt."""
    return over(tokens, result.median("first token", tokens=tokens, **of))


def rows(result: Result) -> Rows:
    """Ratios are of tokens/s over those of the shortest prompt; a prompt that was stopped has neither."""
    dtypes, first = result.keys("dtype"), min(result.keys("tokens"))
    lines = []
    for tokens in result.keys("tokens"):
        for model in result.keys("model"):
            cells = []
            for dtype in dtypes:
                of = dict(model=model, dtype=dtype)
                here = speed(result, tokens, **of)
                seconds = result.median("first token", tokens=tokens, **of)
                cells.append(cell(here, ",.0f", f" ({cell(seconds, ',.1f')} s)"))
                cells.append(cell(over(here, speed(result, first, **of)), ".3f"))
                cells.append(cell(result.median("KV cache", tokens=tokens, **of), ",.1f", " MiB"))
            if any(cells):
                lines.append([f"{tokens:,}", model, *cells])
    header = ["tokens", "model"]
    for dtype in dtypes:
        header += [f"{dtype}, tokens/s (time to first token)", f"over that at {first:,}", "KV a request"]
    return header, lines


def note(result: Result) -> str:
    settings = result.settings
    chunks = ", ".join(f"{model} {chunk:,}" for model, chunk in settings["chunks"].items())
    longest = max(result.keys("tokens"))
    return (
        f"{settings['shape']} shape: {settings['sizes']}; random weights, {settings['mode']}. {OURS}: medians of "
        f"{settings['rounds']} rounds, in each of which every length runs, {longest:,} tokens once. The others: one "
        f"round, up to the first prompt that takes longer than {settings['limit_s']} s, which is stopped. Tokens of a "
        f"step: {chunks}."
    )


def draw(result: Result, figure: Any) -> None:
    """Speed in the type that the processor is fastest in, and bytes in the same."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator  # only pictures need it

    dtype = result.keys("dtype")[-1]
    lengths = result.keys("tokens")
    prompts, held = figure.subplots(1, 2)
    for model in result.keys("model"):
        line: dict[str, Any] = dict(label=model, marker="o", linewidth=2.5 if model == OURS else 1.2)
        speeds = {tokens: speed(result, tokens, model=model, dtype=dtype) for tokens in lengths}
        sizes = {tokens: result.median("KV cache", tokens=tokens, model=model, dtype=dtype) for tokens in lengths}
        for axes, found in ((prompts, speeds), (held, sizes)):
            there = {tokens: value for tokens, value in found.items() if value is not None}
            axes.plot(list(there), list(there.values()), **line)
    prompts.set(title="prompt, tokens/s", yscale="log")
    held.set(title="KV cache, MiB a request", yscale="log")
    for axes in (prompts, held):
        axes.set(xlabel="tokens of the prompt", xscale="log")
        axes.set_xticks(lengths, ["1M" if tokens == 1 << 20 else f"{tokens / 1024:g}K" for tokens in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.legend(*prompts.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(f"{result.settings['shape']} shape, {dtype}, {result.machine}", fontsize="small")


TABLES = (
    Table(
        name="long_prompts",
        about="Prompts of 1,024 to 1,048,576 tokens, in YOCO-U and its peers",
        needs="two quiet cores, 8 GiB of memory",
        takes="40 minutes",
        rows=rows,
        note=note,
        draw=draw,
        picture="speed and KV cache of prompts from 1,024 to 1,048,576 tokens: YOCO-U stays level, the others fall",
    ),
)
