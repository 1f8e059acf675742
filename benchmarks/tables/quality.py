"""What answers are worth: by number of iterations, after upcycling and healing, by lm-eval, and under mixed clients."""

import math
import statistics
from typing import Any

from benchmarks.results import Result
from benchmarks.tables.table import Rows, Table, cell, over


def t_sweep_costs(result: Result, t: int) -> dict[str, tuple[float | None, float | None]]:
    """Prefill and decode in tokens/s, KV cache in MiB; each with its ratio to the first T."""

    def figures(t: int) -> dict[str, float | None]:
        prompt, batch = result.settings["prompt"], result.settings["batch"]
        return {
            "prefill": result.derived("prefill", over(prompt, result.median("first token", T=t)), T=t),
            "decode": result.derived("decode", over(batch, result.median("decode step", T=t)), T=t),
            "KV cache": result.median("KV cache", T=t),
        }

    first = figures(result.keys("T")[0])
    return {
        name: (value, result.derived(f"{name}, this / first T", over(value, first[name]), T=t))
        for name, value in figures(t).items()
    }


def t_sweep_rows(result: Result) -> Rows:
    rows = []
    for t in result.keys("T"):
        costs = t_sweep_costs(result, t)
        cells = [cell(value, ",.0f", f" ({cell(to, '.2f')}x)") for value, to in (costs["prefill"], costs["decode"])]
        held, to = costs["KV cache"]
        perplexity = cell(result.median("held-out perplexity", T=t), ".2f")
        rows.append([t, perplexity, *cells, cell(held, ".2f", f" MiB ({cell(to, '.2f')}x)")])
    return ["T", "held-out perplexity", "prefill tokens/s", "decode tokens/s", "KV a request"], rows


def t_sweep_note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['parameters']:,} parameters, {settings['training_tokens']:,} training tokens and one seed for each "
        f"T; served in {settings['dtype']}, eager, prompts of {settings['prompt']} tokens, {settings['batch']} "
        "requests in decode; in brackets over the first T."
    )


def draw_t_sweep(result: Result, figure: Any) -> None:
    iterations, settings = result.keys("T"), result.settings
    quality, cost = figure.subplots(1, 2)
    quality.plot(iterations, [result.median("held-out perplexity", T=t) for t in iterations], marker="o")
    quality.set(title="held-out perplexity", xlabel="T", xticks=iterations)
    costs = {t: t_sweep_costs(result, t) for t in iterations}
    for name, label in (("prefill", "prefill time"), ("decode", "decode time"), ("KV cache", "KV bytes")):
        ratios = [costs[t][name][1] or math.nan for t in iterations]
        values = ratios if name == "KV cache" else [1 / ratio for ratio in ratios]
        cost.plot(iterations, values, marker="o", label=label)
    cost.set(title=f"cost, T = {iterations[0]} is 1", xlabel="T", xticks=iterations, ylim=(0, None))
    cost.legend()
    title = f"{settings['parameters']:,} parameters, {settings['training_tokens']:,} training tokens, {result.machine}"
    figure.suptitle(title, fontsize="small")


def upcycling_rows(result: Result) -> Rows:
    """Losses are means over the held-out rows; the last column has the standard error of the mean difference."""
    first: list[float] = []
    rows = []
    for one in (one for one in result.measurements if one.name in ("loss at the start", "loss of the source")):
        healed = result.runs("loss healed", **one.of) if one.name == "loss at the start" else []
        first = first or healed
        against = ""
        if healed and healed is not first and not result.transcribed:
            apart = [ours - theirs for ours, theirs in zip(healed, first, strict=True)]
            error = statistics.stdev(apart) / len(apart) ** 0.5
            against = f"{statistics.fmean(apart):+.3f} ± {error:.3f}"
        start = statistics.fmean(one.runs)
        # The source was trained by others: its loss stands where the healed ones stand.
        after = start if one.name == "loss of the source" else statistics.fmean(healed) if healed else None
        cells = ["" if one.name == "loss of the source" else f"{start:.2f}", cell(after, ".2f")]
        cells.append("" if after is None else f"{math.exp(round(after, 2)):.3g}")
        rows.append([one.of["start"], one.of.get("S + C", ""), one.of.get("T", ""), *cells, against])
    header = ["cross-decoder's attention", "S + C", "T", "at the start", "healed", "perplexity healed"]
    return [*header, "against the first"], rows


def upcycling_note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['source']}, rows of {settings['row']} tokens, W = {settings['window']}, {settings['dtype']}. "
        f"Nats a token on {settings['held_out_tokens']:,} held-out tokens. Healing: {settings['steps']} steps of a row "
        f"({settings['steps'] * settings['row']:,} tokens), AdamW at {settings['learning_rate']}; ±: standard error "
        "over the held-out rows."
    )


SCORES = ("PIQA", "BoolQ", "niah_single_1")


def healing_rows(result: Result) -> Rows:
    """KV caches come with the source's over this one, speeds with this one over the source's."""
    source = dict(model=result.measurements[0].of["model"])
    source_held, source_step = result.median("KV cache", **source), result.median("decode step", **source)
    rows = []
    for one in (one for one in result.measurements if one.name == "held-out perplexity"):
        of, t = one.of, one.of.get("T", "")
        # A checkpoint costs the same before and after its healing.
        cost = source if t == "" else dict(T=t)
        held, step_s = result.median("KV cache", **cost), result.median("decode step", **cost)
        speed = result.derived("decode", over(1, step_s), **cost)
        smaller = result.derived("KV cache, source / this", over(source_held, held), **cost)
        faster = result.derived("decode, this / source", over(source_step, step_s), **cost)
        perplexity = one.runs[0]
        cells = [f"{perplexity:,.1f}" if perplexity < 1000 else f"{perplexity:,.0f}"]
        cells += [cell(result.median(score, **of), ".3f") for score in SCORES]
        cells += [
            cell(held, ".1f", f" MiB (1/{cell(smaller, '.1f')})"),
            cell(speed, ".1f", f" ({cell(faster, '.2f')}x)"),
        ]
        rows.append([of["model"], t, *cells])
    return ["model", "T", "held-out perplexity", *SCORES, "KV cache", "decode tokens/s"], rows


def healing_note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['source']}, half of its layers in the self-decoder, W = {settings['window']}. Healing: "
        f"{settings['steps']} steps, {settings['training_tokens']:,} tokens. Perplexity of "
        f"{settings['held_out_tokens']:,} held-out tokens; the first {settings['limit']} items of each task, niah of "
        f"{settings['ruler_tokens']:,} tokens; KV cache of {settings['kv_tokens']:,} tokens and decode steps at "
        f"{settings['context']:,}, one request, {settings['dtype']}, medians of {settings['decode_steps']} interleaved "
        "steps. In brackets: this KV cache over the source's, and this speed over the source's."
    )


def evaluation_rows(result: Result) -> Rows:
    rows = []
    for model in result.keys("model"):
        for task in dict.fromkeys(one.of["task"] for one in result.measurements if one.of["model"] == model):
            of = dict(model=model, task=task)
            apart, alike = result.median("largest difference", **of), result.median("texts alike", **of)
            answers = f"log-likelihoods within {apart:.1e}" if apart is not None else ""
            if alike is not None:
                answers = f"{alike:.0f} of {result.median('texts', **of):.0f} texts the same"
            scores: dict[Any, list[str]] = {}
            for one in result.measurements:
                if one.name == "score" and one.of.items() >= of.items():
                    scores.setdefault(one.of["metric"], []).append(f"{one.of['by']}: {one.runs[0]:.4f}")
            rows += [[model, task, metric, *sides, answers] for metric, sides in scores.items()]
    return ["model", "task", "metric", "one way", "the other", "answers"], rows


def evaluation_note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['dtype']}, the first {settings['limit']} items of each task, RULER at {settings['ruler_tokens']} "
        "tokens."
    )


SENT = ("sent", "answered", "left by the client", "tokens compared")


def soak_rows(result: Result) -> Rows:
    """A row for each kind of request, or, where servers changed, for each server with its own figures."""
    if not (changes := result.keys("changes")):
        counts: dict[Any, list[float]] = {}
        for kind in result.keys("requests"):
            counts[kind] = [result.median(name, requests=kind) or 0 for name in SENT]
        counts["all"] = [sum(row[i] for row in counts.values()) for i in range(len(SENT))]
        return ["requests", *SENT], [[kind, *(f"{n:,}" for n in row)] for kind, row in counts.items()]
    rows = []
    for change in changes:
        of = dict(changes=change)
        sums = [sum(result.median(name, requests=kind, **of) or 0 for kind in result.keys("requests")) for name in SENT]
        figures = [result.median(name, **of) for name in ("changes", "preemptions")]
        grown = [result.median(name, **of) for name in ("memory when warm", "memory at the end")]
        cells = [*(f"{n:,.0f}" for n in sums), *(cell(figure, ",.0f") for figure in figures)]
        rows.append([change, *cells, " to ".join(cell(size, ",.0f", " MiB") for size in grown)])
    return ["what changes", *SENT, "changes", "preemptions", "memory"], rows


def soak_note(result: Result) -> str:
    settings = result.settings
    note = f"{settings['clients']} clients for {settings['minutes']:g} minutes, {settings['model']} in "
    note += settings["dtype"]
    if "kv_cache" not in settings:
        return f"{note}, divided among servers. Preemptions are of the time since a server was warm."
    note += f", a KV cache of {settings['kv_cache']}."
    preemptions, warm = result.median("preemptions"), result.median("memory when warm")
    if preemptions is None or warm is None:
        return note
    return (
        f"{note} {preemptions:.0f} preemptions since it was warm; memory {warm:.0f} MiB then, "
        f"{result.median('memory at the end'):.0f} at the end."
    )


def trainer_kl_rows(result: Result) -> Rows:
    rows = []
    for model in result.keys("model"):
        for dtype in result.keys("dtype"):
            of = dict(model=model, dtype=dtype)
            own, replayed = (
                [
                    cell(result.median("KL", **of, routing=routing), ".1e"),
                    cell(result.median("largest |r - 1|", **of, routing=routing), ".2g"),
                ]
                for routing in ("own", "replayed")
            )
            others = cell(result.median("tokens with other experts", **of), ".1%")
            rows.append([model, dtype, *own, others, *replayed])
    header = ["model", "dtype", "KL, nats", "largest deviation of a ratio", "tokens with other experts"]
    return [*header, "KL, experts replayed", "largest deviation, experts replayed"], rows


def trainer_kl_note(result: Result) -> str:
    settings = result.settings
    return (
        f"KL(trainer ‖ server) over {settings['answers']} answers of {settings['tokens']} tokens after prompts of "
        f"{settings['prompt']}, sampled at temperature 1; eager. Ratios are p_trainer / p_server of sampled tokens."
    )


def company_rows(result: Result) -> Rows:
    """A row for each company, a column for each engine; a cell has vLLM's difference and the invariant engine's."""
    found = [one.of for one in result.measurements if one.name == "largest difference"]
    engines = list(dict.fromkeys((of["model"], of["dtype"], of["how"]) for of in found))
    modes = result.keys("mode")

    def difference(of: dict[str, Any]) -> str:
        nats = result.median("largest difference", **of)
        return "0" if nats == 0 else cell(nats, ".1e")

    rows = []
    for what, company in dict.fromkeys((of["of"], of["company"]) for of in found):
        cells = []
        for model, dtype, how in engines:
            of = dict(model=model, dtype=dtype, how=how, of=what, company=company)
            cells.append(" / ".join(difference(of | dict(mode=mode)) for mode in modes))
        rows.append([what, company, *cells])
    return ["of the", "company", *(", ".join(map(str, engine)) for engine in engines)], rows


def company_price(result: Result, dtype: Any) -> str:
    """How many times as long a prompt and decode steps of the invariant engine take."""
    modes = result.keys("mode")

    def times(name: str, **of: Any) -> str:
        before, after = (result.median(name, dtype=dtype, mode=mode, **of) for mode in modes)
        return cell(result.derived(f"{name}, last / first mode", over(after, before), dtype=dtype, **of), ".2f", "x")

    prices = [f"{times('first token')} for a prompt"]
    prices += [f"{times('decode step', batch=batch)} for a step of {batch}" for batch in result.keys("batch")]
    return f"{dtype}: {', '.join(prices)}"


def company_note(result: Result) -> str:
    settings = result.settings
    prices = "; ".join(company_price(result, dtype) for dtype in result.keys("dtype", "first token"))
    return (
        f"largest difference of a log probability, in nats, from a prompt of {settings['prompt']:,} tokens and its "
        f"answer of {settings['answer']} computed alone; {settings['others']} others of at most "
        f"{settings['longest_other']} tokens, random weights. In a cell: {' / '.join(result.keys('mode'))}. "
        f"Time of the second over the first, 57M, decode at {settings['context']} tokens: {prices}."
    )


TABLES = (
    Table(
        name="company",
        about="How far a request's log probabilities move with what else the engine computes",
        needs="nothing",
        takes="20 minutes",
        rows=company_rows,
        note=company_note,
    ),
    Table(
        name="trainer_kl",
        about="How far the reference model is from the server that samples its answers, in the same dtype",
        needs="nothing",
        takes="10 minutes",
        rows=trainer_kl_rows,
        note=trainer_kl_note,
    ),
    Table(
        name="t_sweep",
        about="One shape trained at several T on the same tokens, and what each T costs to serve",
        needs="--corpus (see examples/training/train.py)",
        takes="half an hour for --steps 120, three hours for --steps 1200",
        rows=t_sweep_rows,
        note=t_sweep_note,
        has_options=True,
        by_default=False,
        each_dtype=True,
        draw=draw_t_sweep,
        picture="held-out perplexity and cost by number of iterations",
    ),
    Table(
        name="upcycling",
        about="Which layers of a Llama make the best start: loss before and after a small healing",
        needs="LLAMA TEXT (a Llama's folder, a text file)",
        takes="half an hour for a Llama of 135M",
        rows=upcycling_rows,
        note=upcycling_note,
        has_options=True,
        by_default=False,
    ),
    Table(
        name="healing",
        about="What an upcycled Llama is worth before and after healing, for each T",
        needs="LLAMA TEXT, network for PIQA and BoolQ",
        takes="two hours for a Llama of 135M and --steps 144 --accumulate 1 --limit 40",
        rows=healing_rows,
        note=healing_note,
        has_options=True,
        by_default=False,
    ),
    Table(
        name="evaluation",
        about="lm-eval through vLLM and through transformers: the same scores and answers",
        needs="network for PIQA and BoolQ; --llama FOLDER for a second model",
        takes="half an hour",
        rows=evaluation_rows,
        note=evaluation_note,
        has_options=True,
    ),
    Table(
        name="soak",
        about="Mixed clients against a server whose KV space is too small for them; it checks every answer",
        needs="nothing",
        takes="15 minutes; --minutes changes that",
        rows=soak_rows,
        note=soak_note,
        has_options=True,
    ),
)
