"""What a GPU makes of the paper's shape: prompts and decode steps, next to a Transformer, and how exact both are."""

from typing import Any

from benchmarks.results import Measurement, Result
from benchmarks.tables.comparisons import LIKE_PAPER, OURS, PAPER_RATIOS, ratio
from benchmarks.tables.table import Rows, Table, cell, over

SKIPPING, EVERY_ROW = "skipping", "every row"
KERNELS = f"{OURS}, option kernels"
PAPER_REQUESTS = 32  # of the paper's decode speeds

# Measurements of gpu_exactness, which have one run for each scenario.
COMPARED, GREEDY, OTHERS = "log probabilities", "greedy tokens", "other greedy tokens"
LARGEST, OWN_LARGEST = "largest difference", "largest difference, reference"
MEDIAN, OWN_MEDIAN = "median difference", "median difference, reference"
SKIPPED, TO_SKIP = "skipped rows", "rows that can be skipped"


def in_chunks(tokens: int) -> str:
    """The name of YOCO-U with that many tokens in a step, at most."""
    return f"{OURS}, {tokens:,} tokens a step"


def gpu_prefill_rows(result: Result) -> Rows:
    """Tokens/s of one prompt, and their ratios."""
    first = result.keys("model")[0]
    rows = []
    for tokens in result.keys("tokens"):
        paper = PAPER_RATIOS[LIKE_PAPER].get(tokens, (None, None, None))[0]

        def speed(model: str, way: str, tokens: int = tokens) -> float | None:
            return over(tokens, result.median("first token", tokens=tokens, model=model, way=way))

        for model in result.keys("model"):
            every, skipping = speed(model, EVERY_ROW), speed(model, SKIPPING)
            if every is None:
                continue
            cells = [cell(every, ",.0f"), cell(skipping, ",.0f"), ratio(over(skipping, every))]
            cells.append(ratio(over(skipping, speed(first, SKIPPING))))
            cells.append(ratio_or_nothing(over(skipping, speed(LIKE_PAPER, EVERY_ROW)), paper))
            rows.append([f"{tokens:,}", model, *cells])
    ways = [f"{EVERY_ROW}, tokens/s", f"{SKIPPING}, tokens/s", f"{SKIPPING} / {EVERY_ROW}"]
    return ["prompt tokens", "model", *ways, f"{SKIPPING} / the first model's", f"{SKIPPING} / the Transformer's"], rows


def gpu_decode_rows(result: Result) -> Rows:
    """Speeds from median steps; models whose KV cache does not hold the requests have no row."""
    first = result.keys("model")[0]
    rows = []
    for batch in result.keys("batch"):
        for tokens in result.keys("tokens"):
            taken = {
                model: step_s
                for model in result.keys("model")
                if (step_s := result.median("decode step", batch=batch, tokens=tokens, model=model)) is not None
            }
            paper = PAPER_RATIOS[LIKE_PAPER].get(tokens, (None, None, None))[1] if batch == PAPER_REQUESTS else None
            for model, step_s in taken.items():
                cells = [cell(step_s * 1e3, ".3f", " ms"), cell(batch / step_s, ",.0f")]
                # Tokens/s are the inverse of steps.
                faster = over(taken.get(LIKE_PAPER), step_s)
                compared = "" if faster is None or model == LIKE_PAPER else ratio(faster, paper)
                rows.append([batch, f"{tokens:,}", model, *cells, ratio(over(taken.get(first), step_s)), compared])
    header = ["requests", "context", "model", "decode step", "tokens/s"]
    return [*header, "tokens/s / the first model's", "tokens/s / the Transformer's"], rows


def machine_note(result: Result) -> str:
    settings = result.settings
    named = {model: tokens for model, tokens in settings["chunks"].items() if "tokens a step" not in model}
    others = "".join(f" {model}: {tokens:,} tokens a step." for model, tokens in named.items())
    return (
        f"{settings['shape']} shape: {settings['sizes']}; random weights, {settings['dtype']}, {settings['mode']}; "
        f"engines are measured one after the other.{others} The paper's ratios are of an H100 in bfloat16."
    )


def gpu_prefill_note(result: Result) -> str:
    rounds = "/".join(map(str, result.settings["rounds"].values()))
    return f"{machine_note(result)} One prompt at a time, medians of {rounds}, its two ways interleaved."


def gpu_decode_note(result: Result) -> str:
    return (
        f"{machine_note(result)} Medians of {result.settings['steps']} steps; the contexts are scheduled and not "
        "computed. A model has no row where its KV cache does not hold so many requests."
    )


def ratio_or_nothing(here: float | None, paper: float | None) -> str:
    return "" if here is None else ratio(here, paper)


def draw_gpu_prefill(result: Result, figure: Any) -> None:
    """Tokens/s over the prompt's length: of YOCO-U by tokens a step, and of the Transformer."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter  # only pictures need it

    axes = figure.subplots()
    lengths = result.keys("tokens")
    for model in result.keys("model"):
        way = EVERY_ROW if model == LIKE_PAPER else SKIPPING
        taken = {tokens: result.median("first token", tokens=tokens, model=model, way=way) for tokens in lengths}
        speeds = {tokens: tokens / first_s for tokens, first_s in taken.items() if first_s}
        if len(speeds) == len(lengths):
            axes.plot(
                list(speeds), list(speeds.values()), label=model, marker="o", linewidth=2.5 if OURS in model else 1.5
            )
    axes.set(
        title=f"prompt tokens/s, {result.machine}, {result.settings['shape']} shape", xlabel="tokens of the prompt"
    )
    axes.set(xscale="log", ylim=(0, None))
    axes.set_xticks(lengths, [f"{tokens / 1024:g}k" for tokens in lengths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def gpu_speed_rows(result: Result) -> Rows:
    """Speeds of prompts that skip rows and of decode steps; ratios to the Transformer, faster is more than one."""
    batches = result.settings["batches"]
    rows = []
    for tokens in result.keys("tokens"):
        paper = PAPER_RATIOS[LIKE_PAPER].get(tokens, (None, None, None))
        for model in result.keys("model"):
            way = EVERY_ROW if model == LIKE_PAPER else SKIPPING
            first_s = result.median("first token", tokens=tokens, model=model, way=way)
            theirs_s = result.median("first token", tokens=tokens, model=LIKE_PAPER, way=EVERY_ROW)
            compared = None if model == LIKE_PAPER else over(theirs_s, first_s)
            cells = [cell(over(tokens, first_s), ",.0f"), ratio_or_nothing(compared, paper[0])]
            for batch in batches:
                step_s = result.median("decode step", batch=batch, tokens=tokens, model=model)
                theirs_s = result.median("decode step", batch=batch, tokens=tokens, model=LIKE_PAPER)
                compared = None if model == LIKE_PAPER else over(theirs_s, step_s)
                expected = paper[1] if batch == PAPER_REQUESTS else None
                step_ms = None if step_s is None else step_s * 1e3
                cells += [cell(step_ms, ".3f", " ms"), ratio_or_nothing(compared, expected)]
            rows.append([f"{tokens:,}", model, *cells])
    steps = [name for batch in batches for name in (f"decode step, {batch} requests", "/ the Transformer's")]
    return ["tokens", "model", "prompt tokens/s", "/ the Transformer's", *steps], rows


def exactness_row(ones: list[Measurement]) -> list[str]:
    """Cells that sum up the measurements of some checks."""

    def runs(name: str) -> list[float]:
        return [value for one in ones if one.name == name for value in one.runs]

    times = [served / own for served, own in zip(runs(LARGEST), runs(OWN_LARGEST), strict=True)]
    medians = [sum(values) / len(values) if values else None for values in (runs(MEDIAN), runs(OWN_MEDIAN))]
    return [
        f"{sum(runs(COMPARED)):,}",
        f"{sum(runs(OTHERS)):,} of {sum(runs(GREEDY)):,}",
        cell(max(runs(LARGEST)), ".1e"),
        cell(max(runs(OWN_LARGEST)), ".1e"),
        cell(max(times), ".2f", "x"),
        *(cell(value, ".1e") for value in medians),
        f"{sum(runs(SKIPPED)):,} of {sum(runs(TO_SKIP)):,}",
    ]


def gpu_exactness_rows(result: Result) -> Rows:
    """A row for each run; models are summed up, and so are the runs of a dtype that has several."""
    rows = []
    for dtype in result.keys("dtype"):
        of_dtype = [one for one in result.measurements if one.of["dtype"] == dtype]
        runs = list(dict.fromkeys(one.of["run"] for one in of_dtype))
        for run in runs:
            ones = [one for one in of_dtype if one.of["run"] == run]
            models = ", ".join(dict.fromkeys(str(one.of["model"]) for one in ones))
            rows.append([dtype, run, models, *exactness_row(ones)])
        if len(runs) > 1:
            rows.append([dtype, "all", "", *exactness_row(of_dtype)])
    header = ["dtype", "run", "models", COMPARED, "greedy tokens, others than the reference's"]
    header += [LARGEST, "of the reference itself", "ratio in a check, at most"]
    return [*header, MEDIAN, "of the reference itself", "rows skipped, of those that can be"], rows


def gpu_speed_note(result: Result) -> str:
    return (
        f"{gpu_prefill_note(result)} Medians of {result.settings['steps']} decode steps, whose contexts are scheduled "
        "and not computed; speeds are compared, so that more than one is faster."
    )


def gpu_exactness_note(result: Result) -> str:
    settings = result.settings
    return (
        f"Differences of log probabilities in nats, from the reference model's on the CPU. In float32 that is the "
        f"float32 reference, and its own difference is the one from float64 (bound: {settings['bound']}). In bfloat16 "
        "it is float64 with the same rounded weights, and its own difference is that of the reference in bfloat16. "
        "A greedy token counts as another one where the reference's two best logits are more than "
        f"{settings['margin']:g} apart. Checks of a model: {', '.join(settings['checks'])}. Medians are means of the "
        "checks' medians."
    )


TABLES = (
    Table(
        name="gpu_prefill",
        about="Prompts of the paper's shape by tokens a step, with and without row skipping",
        needs="a GPU with 40 GiB free",
        takes="10 minutes on a GPU, by estimate",
        rows=gpu_prefill_rows,
        note=gpu_prefill_note,
        module="gpu",
        arguments=("prefill",),
        draw=draw_gpu_prefill,
        picture="speed of prompts over their length, of YOCO-U and of a Transformer",
        by_default=False,
        has_options=True,
    ),
    Table(
        name="gpu_decode",
        about="Decode steps of the paper's shape, with and without the plugin's kernels",
        needs="a GPU with 40 GiB free",
        takes="10 minutes on a GPU, by estimate",
        rows=gpu_decode_rows,
        note=gpu_decode_note,
        module="gpu",
        arguments=("decode",),
        by_default=False,
    ),
    Table(
        name="gpu_speed",
        about="Prompts and decode steps of 8K and 64K tokens in the paper's shape, next to a Transformer",
        needs="a GPU with 40 GiB free",
        takes="2 minutes on a GPU, by estimate",
        rows=gpu_speed_rows,
        note=gpu_speed_note,
        by_default=False,
        has_options=True,
    ),
    Table(
        name="gpu_exactness",
        about="Log probabilities and greedy tokens of a checkpoint on a GPU, next to the reference on the CPU",
        needs="a GPU",
        takes="10 minutes on a GPU, by estimate",
        rows=gpu_exactness_rows,
        note=gpu_exactness_note,
        by_default=False,
        has_options=True,
    ),
)
