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
    first = min(result.keys("tokens"))
    lines = []
    for tokens in result.keys("tokens"):
        for model in result.keys("model"):
            here, held = speed(result, tokens, model=model), result.median("KV cache", tokens=tokens, model=model)
            seconds = result.median("first token", tokens=tokens, model=model)
            if held is not None:
                ratio = over(here, speed(result, first, model=model))
                cells = [cell(here, ",.0f", f" ({cell(seconds, ',.1f')} s)"), cell(ratio, ".3f")]
                lines.append([f"{tokens:,}", model, *cells, cell(held, ",.1f", " MiB")])
    header = ["tokens", "model", "tokens/s (time to first token)", f"over that of {first:,} tokens", "KV a request"]
    return header, lines


def note(result: Result) -> str:
    settings = result.settings
    chunks = ", ".join(f"{model} {chunk:,}" for model, chunk in settings["chunks"].items())
    longest = max(result.keys("tokens"))
    return (
        f"{settings['shape']} shape: {settings['sizes']}; random weights, {settings['dtype']}, {settings['mode']}. "
        f"{OURS}: medians of {settings['rounds']} rounds, in each of which every length runs, {longest:,} tokens once. "
        f"The others: one round, up to the first prompt that takes longer than {settings['limit_s']} s, which is "
        f"stopped. Tokens of a step: {chunks}."
    )


def draw(result: Result, figure: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator  # only pictures need it

    lengths = result.keys("tokens")
    prompts, held = figure.subplots(1, 2)
    for model in result.keys("model"):
        line: dict[str, Any] = dict(label=model, marker="o", linewidth=2.5 if model == OURS else 1.2)
        speeds = {tokens: speed(result, tokens, model=model) for tokens in lengths}
        sizes = {tokens: result.median("KV cache", tokens=tokens, model=model) for tokens in lengths}
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
    figure.suptitle(f"{result.settings['shape']} shape, {result.settings['dtype']}, {result.machine}", fontsize="small")


TABLES = (
    Table(
        name="long_prompts",
        about="Prompts of 1,024 to 1,048,576 tokens, in YOCO-U and its peers",
        needs="two quiet cores, 16 GiB of memory",
        takes="40 minutes",
        rows=rows,
        note=note,
        each_dtype=True,
        draw=draw,
        picture="speed and KV cache of prompts from 1,024 to 1,048,576 tokens: YOCO-U beside its peers",
    ),
)
