"""What `max_global_block` costs and saves where conversations grow, and whether its default should change."""

import statistics

from benchmarks.results import Key, Result
from benchmarks.tables.table import Rows, Table, cell, over

TIMED, PAPER = "57M", "paper 1.3B"
AMPLE, DENSE = "ample", "ample, windows kept at every step of hits"
DEFAULT = 512
WINDOW = f"the window, from 256 to {DEFAULT} tokens"
# The default changes only where all three hold.
FALL, SLOWER, GROUPS = 0.10, 0.01, 3


def percentile_95(runs: list[float]) -> float | None:
    return statistics.quantiles(runs, n=20, method="inclusive")[-1] if runs else None


def again(result: Result, shape: str, limit: int, pool: str, trace: str = "chats") -> float | None:
    """Tokens that a turn computes again, on average."""
    of: dict[str, Key] = dict(shape=shape, limit=limit, pool=pool, trace=trace)
    return over(result.median("computed again", **of), result.median("turns", **of))


def slower(result: Result, limit: int) -> float | None:
    """By which share a step is longer than the default's: the model's part is the same, what is around it differs."""
    around, default = (result.median("outside the model", shape=TIMED, limit=one) for one in (limit, DEFAULT))
    whole = result.median("decode step", shape=TIMED, limit=DEFAULT)
    return None if around is None or default is None else over(around - default, whole)


def rules(result: Result) -> dict[str, dict[str, int]]:
    """Rules for the longest global block, and the measured limit that each means for a shape."""
    limits, windows = result.keys("limit"), result.settings["windows"]
    found = {f"{limit} tokens": dict.fromkeys(windows, limit) for limit in limits if limit != DEFAULT}
    within = {shape: max(limit for limit in limits if limit <= window) for shape, window in windows.items()}
    return found | {WINDOW: within}


def verdict(result: Result, rule: dict[str, int]) -> tuple[bool, str]:
    """Whether the default should become this rule, and the three figures that decide."""
    fall = over(*(percentile_95(result.runs("time to first token", shape=TIMED, limit=n)) for n in (rule[TIMED], 512)))
    assert fall is not None
    more, groups = slower(result, rule[TIMED]), result.median("KV groups", shape=PAPER, limit=rule[PAPER])
    assert more is not None and groups is not None
    holds = fall <= 1 - FALL and more < SLOWER and groups <= GROUPS
    return holds, f"p95 {fall - 1:+.0%}, step {more:+.1%}, paper's shape {groups} groups"


def rows(result: Result) -> Rows:
    pools = result.keys("pool")
    table = []
    for shape in result.keys("shape"):
        for limit in result.keys("limit"):
            of: dict[str, Key] = dict(shape=shape, limit=limit)
            cells = [cell(result.median(name, **of)) for name in ("KV groups", "step of hits")]
            cells += [cell(again(result, shape, limit, pool), ".0f") for pool in pools]
            first_s = result.runs("time to first token", **of)
            median_s = statistics.median(first_s) if first_s else None
            cells += [cell(median_s, ".2f", " s"), cell(percentile_95(first_s), ".2f", " s")]
            step = sorted(result.runs("decode step", **of))
            spread = f" ({step[len(step) // 4]:.1f} to {step[-1 - len(step) // 4]:.1f})" if step else ""
            cells += [cell(result.median("decode step", **of), ".1f", f" ms{spread}")]
            cells += [cell(result.median("outside the model", **of), ".2f", " ms")]
            table.append([shape, limit, *cells])
    header = ["shape", "`max_global_block`", "KV groups", "step of hits", *(f"again, {pool}" for pool in pools)]
    return [*header, "first token, median", "p95", "decode step", "processor outside the model"], table


def spared(result: Result, shape: str, trace: str) -> str:
    """Tokens that windows computed again would spare, of all that are computed again, in every pool that evicts."""
    of: dict[str, Key] = dict(shape=shape, limit=DEFAULT, trace=trace)
    pools = [pool for pool in result.keys("pool") if pool not in (AMPLE, DENSE)]
    figures = [(result.median("spared by windows computed again", **of, pool=pool), pool) for pool in pools]
    return " and ".join(
        f"{value:,.0f} of {result.median('computed again', **of, pool=pool):,.0f} in a pool of {pool}"
        for value, pool in figures
        if value is not None
    )


def note(result: Result) -> str:
    settings = result.settings
    verdicts = {rule: verdict(result, limits) for rule, limits in rules(result).items()}
    chosen = [rule for rule, (holds, _) in verdicts.items() if holds]
    figures = "; ".join(f"{rule}: {said}" for rule, (_, said) in verdicts.items())
    return (
        "Tokens that a turn computes again on average, with vLLM's scheduler and no model, where users of "
        "benchmarks/conversations.py chat: in a pool that evicts nothing, and in 1.5 times and once the memory that "
        f"the conversations take when they end. Time to first token of {settings['conversations']} of them, "
        f"{settings['rounds']} interleaved rounds. Decode steps of {settings['batch']} requests of "
        f"{settings['context']} tokens, medians and quartiles of {settings['steps']} interleaved ones. The default "
        f"changes if p95 falls by {FALL:.0%}, a step slows by less than {SLOWER:.0%} and the paper's shape keeps "
        f"{GROUPS} groups: {figures}. So {' or '.join(chosen) or 'none of them'} may take its place. With documents of "
        f"2,000 to 28,000 tokens first, windows that are computed again over cached global blocks would spare the "
        f"{TIMED} shape {spared(result, TIMED, 'documents')}, and the paper's {spared(result, PAPER, 'documents')}; "
        f"of chats they would spare {spared(result, TIMED, 'chats')}."
    )


TABLES = (
    Table(
        name="prefix_caching",
        about="Tokens that conversations compute again, first tokens and decode steps, by max_global_block",
        needs="two quiet cores",
        takes="12 minutes",
        rows=rows,
        note=note,
    ),
)
