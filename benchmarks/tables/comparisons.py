"""YOCO-U compared with what one would use instead: other models in vLLM, transformers, and vLLM without its choices."""

from typing import Any

from benchmarks.results import Result
from benchmarks.tables.table import Rows, Table, cell, over

OURS, LIKE_PAPER, LOOPED = "YOCO-U", "Transformer, S + C layers", "IQuestLoopCoder, 2 · (S + C) passes"
UNPACKED = "YOCO-U, a group for each cache"

# From the paper's table of inference costs (arXiv 2604.01220): prefill, decode and KV bytes of YOCO-U over those of a
# Transformer of S + C layers, and over those of its looped model, RINS.
PAPER_RATIOS: dict[str, dict[int, tuple[float, float | None, float | None]]] = {
    LIKE_PAPER: {
        8 << 10: (75_637 / 85_707, None, 46 / 320),
        16 << 10: (75_694 / 66_342, 1_966 / 1_795, 62 / 640),
        64 << 10: (76_148 / 27_276, 865 / 450, 158 / 2_560),
        256 << 10: (76_301 / 7_475, 303 / 137, 542 / 10_240),
    },
    LOOPED: {
        16 << 10: (75_694 / 33_276, 1_966 / 580, None),
        64 << 10: (76_148 / 13_630, 865 / 118, None),
        256 << 10: (76_301 / 3_739, 303 / 56, None),
    },
}


def prefill_speed(result: Result, tokens: int, model: str) -> float | None:
    """Tokens/s of a prompt."""
    first_s = result.median("first token", tokens=tokens, model=model)
    return result.derived("prefill", over(tokens, first_s), tokens=tokens, model=model)


def decode_speed(result: Result, tokens: int, model: str, batch: int) -> float | None:
    """Tokens/s of `batch` requests; None where they do not fit."""
    step_s = result.median("decode step", tokens=tokens, model=model, batch=batch)
    return result.derived("decode", over(batch, step_s), tokens=tokens, model=model, batch=batch)


def ratio(here: float | None, paper: float | None = None) -> str:
    printed = cell(here, ".2f", "x")
    return f"{printed} (paper {paper:.2f}x)".strip() if paper else printed


def peers_rows(result: Result) -> Rows:
    """Ratios are of tokens/s, and of the KV cache's bytes."""
    batches, budget = result.settings["batches"], result.settings["budget_gib"]
    rows = []
    for tokens in result.keys("tokens"):
        for model in result.keys("model"):
            of: dict[str, Any] = dict(tokens=tokens, model=model)
            paper = PAPER_RATIOS.get(model, {}).get(tokens, (None, None, None))
            speed, ours = prefill_speed(result, **of), prefill_speed(result, tokens, OURS)
            first_s = result.median("first token", **of)
            cells = [cell(speed, ",.0f", f" ({cell(first_s, '.2f')} s)")]
            cells.append(ratio(result.derived("prefill, YOCO-U / this", over(ours, speed), **of), paper[0]))
            for batch in batches:
                speed, ours = decode_speed(result, **of, batch=batch), decode_speed(result, tokens, OURS, batch)
                here = result.derived("decode, YOCO-U / this", over(ours, speed), **of, batch=batch)
                cells += [cell(speed, ".1f") or "does not fit", ratio(here, paper[1] if batch > 1 else None)]
            held, ours = result.median("KV cache", **of), result.median("KV cache", tokens=tokens, model=OURS)
            here = result.derived("KV cache, YOCO-U / this", over(ours, held), **of)
            fitting = result.derived("requests in the budget", over(budget << 10, held), **of)
            cells += [cell(held, ".1f", " MiB"), ratio(here, paper[2]), cell(fitting and int(fitting))]
            rows.append([tokens, model, *cells])
    header = ["tokens", "model", "prefill tokens/s (time to first token)", "YOCO-U / this"]
    for batch in batches:
        header += [f"decode tokens/s, batch {batch}", "YOCO-U / this"]
    return [*header, "KV a request", "YOCO-U / this", f"requests in {budget} GiB"], rows


def peers_note(result: Result) -> str:
    settings = result.settings
    chunks, groups = (", ".join(f"{model} {n}" for model, n in settings[what].items()) for what in ("chunks", "groups"))
    paper = ""
    if PAPER_RATIOS.keys() & settings["groups"].keys():
        paper = (
            "The paper's ratios are of its 1.3B shape in bfloat16, batch 32, on an H100, that of a looped model over "
        )
        paper += "RINS. "
    return (
        f"{settings['shape']} shape: {settings['sizes']}; random weights, {settings['dtype']}, {settings['mode']}; "
        f"medians of {'/'.join(map(str, settings['rounds'].values()))} prompts and {settings['steps']} steps, "
        f"interleaved. {paper}KV cache groups: {groups}. Tokens of a step: {chunks}."
    )


def draw_peers(result: Result, figure: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # only pictures need it

    lengths, most = result.keys("tokens"), result.settings["batches"][-1]
    prompts, steps, bytes_ = figure.subplots(1, 3)
    for model in result.keys("model"):
        line: dict[str, Any] = dict(label=model, marker="o", linewidth=2.5 if model == OURS else 1.2)
        line["linestyle"] = "--" if model == UNPACKED else "-"  # it lies on YOCO-U's own line
        prompts.plot(lengths, [prefill_speed(result, tokens, model) for tokens in lengths], **line)
        decoded = {tokens: decode_speed(result, tokens, model, most) for tokens in lengths}
        fitting = {tokens: speed for tokens, speed in decoded.items() if speed is not None}
        steps.plot(list(fitting), list(fitting.values()), **line)
        bytes_.plot(lengths, [result.median("KV cache", tokens=tokens, model=model) for tokens in lengths], **line)
    labels = ("prefill, tokens/s", f"decode, tokens/s, {most} requests", "KV cache, MiB a request")
    for axes, label in zip((prompts, steps, bytes_), labels, strict=True):
        axes.set(title=label, xlabel="tokens", xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{tokens / 1024:g}k" for tokens in lengths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*prompts.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"{result.settings['shape']} shape, {result.settings['dtype']}, {result.machine}", fontsize="small")


def reference_model_rows(result: Result) -> Rows:
    theirs, ours = "generate()", "vLLM"
    rows = []
    for prompt in result.keys("prompt"):
        for batch in result.keys("batch"):
            of = dict(prompt=prompt, batch=batch)
            first = {way: result.median("first token", **of, way=way) for way in (theirs, ours)}
            speed = {
                way: result.derived("decode", over(batch, result.median("decode step", **of, way=way)), **of, way=way)
                for way in (theirs, ours)
            }
            later = result.derived("first token, generate() / vLLM", over(first[theirs], first[ours]), **of)
            faster = result.derived("decode, vLLM / generate()", over(speed[ours], speed[theirs]), **of)
            cells = [*(cell(over(s, 1e-3), ",.0f", " ms") for s in first.values()), cell(later, ".2f", "x")]
            cells += [*(cell(tokens, ".1f") for tokens in speed.values()), cell(faster, ".2f", "x")]
            rows.append([prompt, batch, *cells])
    header = ["prompt", "batch", f"first token, {theirs}", ours, f"{theirs} / {ours}"]
    return [*header, f"decode tokens/s, {theirs}", ours, f"{ours} / {theirs}"], rows


def reference_model_note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['shape']} shape, {settings['kv_heads']} KV heads, random weights, {settings['dtype']}, "
        f"{settings['threads']} threads each, vLLM eager; medians of {settings['rounds']} interleaved rounds, decode "
        f"over {settings['steps']} steps."
    )


# Figures of `vllm bench serve`: its own name for each, and how many digits are shown.
FIGURES = {
    "requests/s": ("request_throughput", 2),
    "tokens/s, prompts and answers": ("total_token_throughput", 1),
    "median time to first token, ms": ("median_ttft_ms", 1),
    "median time of a further token, ms": ("median_tpot_ms", 1),
}


def bench_serve_rows(result: Result) -> Rows:
    """Each figure, with its ratio to the last row's."""
    *_, last = result.keys("way")
    rows = []
    for way in result.keys("way"):
        row = [way]
        for name, (_, digits) in FIGURES.items():
            value, base = result.median(name, way=way), result.median(name, way=last)
            times = result.derived(f"{name}, this / last", over(value, base), way=way)
            row.append(cell(value, f",.{digits}f", f" ({cell(times, '.2f')}x)"))
        rows.append(row)
    return ["", *FIGURES], rows


def bench_serve_note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['shape']} shape, {settings['kv_heads']} KV heads, random weights, {settings['dtype']}, eager: "
        f"{settings['prompts']} prompts of {settings['prefix']} tokens in common and {settings['input']} of their own, "
        f"{settings['output']} tokens of answer, {settings['concurrency']} at a time; medians of {settings['rounds']} "
        "interleaved runs, and in brackets what each is to the last line's."
    )


PEERS: dict[str, Any] = dict(
    rows=peers_rows,
    note=peers_note,
    draw=draw_peers,
    picture="prefill, decode and KV cache of YOCO-U and other models over the length of the context",
)
TABLES = (
    Table(
        name="peers",
        each_dtype=True,
        about="YOCO-U compared with Transformers and looped models in the same vLLM",
        needs="two quiet cores, 8 GiB of memory",
        takes="25 minutes",
        **PEERS,
    ),
    Table(
        name="peers_paper",
        about="The same in the paper's 1.3B shape; --paper alone runs it too",
        needs="a GPU with 125 GiB free",
        takes="on a GPU, where it has not been timed",
        module="peers",
        arguments=("--paper",),
        by_default=False,
        **PEERS,
    ),
    Table(
        name="dory",
        each_dtype=True,
        about="YOCO-U with T = 2 compared with NVIDIA's Dory, a looped model of vLLM 0.33",
        needs="two quiet cores, 8 GiB of memory, vLLM 0.33",
        takes="15 minutes",
        by_default=False,
        **PEERS,
    ),
    Table(
        name="reference_model",
        each_dtype=True,
        about="vLLM compared with transformers' generate() of the reference model",
        needs="two quiet cores and no GPU",
        takes="8 minutes",
        rows=reference_model_rows,
        note=reference_model_note,
    ),
    Table(
        name="bench_serve",
        each_dtype=True,
        about="`vllm bench serve`, with row skipping and prefix caching on and off",
        needs="two quiet cores, 8 GiB of memory",
        takes="15 minutes",
        rows=bench_serve_rows,
        note=bench_serve_note,
    ),
)
