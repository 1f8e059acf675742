"""How fast the plugin's own choices are: prompts that skip the cross-decoder, compilation, start-up and kernels."""

from benchmarks.results import Result
from benchmarks.tables.table import Rows, Table, cell, over


def prefill_rows(result: Result) -> Rows:
    ways = ("every row", "skipping", "self-decoder alone")
    rows = []
    for tokens in result.keys("tokens"):
        every_s, skipping_s, alone_s = (result.median("first token", tokens=tokens, way=way) for way in ways)
        by_flops = result.median("ceiling by FLOPs", tokens=tokens)
        ratios = {
            "speed-up": over(every_s, skipping_s),
            "ceiling by time": over(every_s, alone_s),
            "reached, by time": over(alone_s, skipping_s),
            "reached, by FLOPs": over(over(every_s, skipping_s), by_flops),
        }
        found = {name: result.derived(name, value, tokens=tokens) for name, value in ratios.items()}
        cells = [cell(seconds, ".2f", " s") for seconds in (every_s, skipping_s, alone_s)]
        cells += [cell(found[name], ".2f", "x") for name in ("speed-up", "ceiling by time")]
        cells += [cell(by_flops, ".2f", "x")]
        rows.append([tokens, *cells, *(cell(found[name], ".0%") for name in ("reached, by time", "reached, by FLOPs"))])
    header = ["prompt tokens", *ways, "speed-up", "ceiling by time", "ceiling by FLOPs"]
    return [*header, "reached, by time", "reached, by FLOPs"], rows


def prefill_note(result: Result) -> str:
    return (
        f"{result.settings['shape']} shape, {result.settings['dtype']}, chunks of the plugin's default, medians of "
        f"{'/'.join(map(str, result.settings['rounds'].values()))} interleaved rounds. The machine is noisy by a few "
        "per cent, so that more than 100 % can be reached."
    )


def prefill_node_rows(result: Result) -> Rows:
    ways = result.keys("way")
    rows = []
    for tokens in result.keys("tokens"):
        every_s, one_s, none_s = (result.median("prefill", tokens=tokens, way=way) for way in ways)
        ratios = {"every row / no row": over(every_s, none_s), "one row / no row": over(one_s, none_s)}
        found = [result.derived(name, value, tokens=tokens) for name, value in ratios.items()]
        cells = [cell(None if it is None else it * 1e3, ",.0f", " ms") for it in (every_s, one_s, none_s)]
        rows.append([f"{tokens:,}", *cells, *(cell(ratio, ".3f", "x") for ratio in found)])
    return ["prompt tokens", *ways, "every row / no row", "one row / no row"], rows


def prefill_node_note(result: Result) -> str:
    return (
        f"{result.settings['shape']} shape, {result.settings['dtype']}, time until the caches of one prompt are whole, "
        f"medians of {'/'.join(map(str, result.settings['rounds'].values()))} interleaved rounds. One row is what any "
        "engine runs, none what a prefill node runs."
    )


WIDE = "bfloat16, float32 residual"
DTYPES = ("float32", "bfloat16", WIDE)


def dtypes_rows(result: Result) -> Rows:
    """A row for prompts and for each batch of decodes; a ratio of more than one is for the second."""
    wanted = {"prompt": ("first token", dict[str, int]())}
    wanted |= {f"decode step, {batch} requests": ("decode step", dict(batch=batch)) for batch in result.keys("batch")}
    rows = []
    for what, (name, of) in wanted.items():
        single_s, half_s, wide_s = (result.median(name, dtype=dtype, **of) for dtype in DTYPES)
        cells = [cell(None if value is None else value * 1e3, ",.1f", " ms") for value in (single_s, half_s, wide_s)]
        ratios = [cell(over(single_s, half_s), ".2f", "x"), cell(over(half_s, wide_s), ".2f", "x")]
        rows.append([what, *cells, *ratios])
    return ["", *DTYPES, "float32 / bfloat16", "bfloat16 / with a float32 residual"], rows


def dtypes_note(result: Result) -> str:
    features = ", ".join(result.environment["processor"]["features"]) or "no features that are known"
    settings = result.settings
    return (
        f"{settings['shape']} shape, random weights, eager; prompts of {settings['tokens']:,} tokens, decode steps at "
        f"{settings['context']} tokens; medians of {settings['rounds']} interleaved prompts and {settings['steps']} "
        f"steps. The processor has {features}."
    )


def compilation_rows(result: Result) -> Rows:
    ways, parts = result.keys("way"), ("products", "attention", "other native")
    rows = []
    for batch in result.keys("batch", "step"):
        eager = result.median("step", batch=batch, way="eager")
        for way in ways:
            of = dict(batch=batch, way=way)
            step = result.median("step", **of)
            native = [result.median(part, **of) for part in parts]
            rest = None if step is None or None in native else step - sum(part or 0 for part in native)
            python = result.derived("Python and dispatch", rest, **of)
            share = result.derived("Python and dispatch, share", over(rest, step), **of)
            around = result.median("around the model", **of)
            ratio = result.derived("eager / this", over(eager, step), **of)
            cells = [cell(step, ".1f", " ms"), cell(ratio, ".2f", "x"), *(cell(part, ".1f", " ms") for part in native)]
            cells += [cell(python, ".1f", f" ms, {cell(share, '.0%')}"), cell(around, ".1f", " ms")]
            rows.append([batch, way, *cells])
    eager = result.median("prompt", way="eager")
    for way in ways:
        seconds = result.median("prompt", way=way)
        ratio = result.derived("eager / this", over(eager, seconds), batch="prompt", way=way)
        rows.append(["prompt", way, cell(seconds, ".2f", " s"), cell(ratio, ".2f", "x"), *[""] * 5])
    header = ["batch", "self-decoder", "step", "eager / this", *parts, "Python and dispatch", "around the model"]
    return header, rows


def compilation_note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['shape']} shape, {settings['dtype']}, T = {settings['iterations']}, decode steps with contexts of "
        f"{settings['context']} tokens, medians of {settings['steps']} interleaved steps, and a prompt of "
        f"{settings['prompt']} tokens, medians of {settings['prompts']}. Native time is the operations' own time, in "
        "steps under torch's profiler (recording makes it look a little longer); Python and dispatch is the rest of a "
        "step without it. Around the model: the part of a step, native or not, in which vLLM schedules, prepares "
        "inputs and samples."
    )


def start_up_rows(result: Result) -> Rows:
    """The quickest start of each kind."""
    first = min(result.keys("T"))
    rows = []
    for t in result.keys("T"):
        eager = min(result.runs("ready", T=t, start="eager"))
        for way in result.keys("start"):
            of = dict(T=t, start=way)
            ready = min(result.runs("ready", **of), default=None)
            if ready is None:
                continue
            warm = min(result.runs("warm-up", **of), default=None)
            firsts = min(result.runs("warm-up", T=first, start=way), default=None) if t != first else None
            to_eager = result.derived("this / eager", over(ready, eager) if way != "eager" else None, **of)
            to_first = result.derived("this / first T", over(warm, firsts), **of)
            cells = [cell(ready, ".1f", " s"), cell(to_eager, ".2f", "x"), cell(warm, ".1f", " s")]
            rows.append([t, way, *cells, cell(to_first, ".2f", "x")])
    return ["T", "start", "ready", "this / eager", "warm-up", f"this / T = {first}"], rows


def start_up_note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['shape']} shape, {settings['dtype']}, from the command `vllm serve` until it answers. Warm-up is "
        "the part in which vLLM compiles, or loads what it has compiled, and runs a step; an eager start has none. The "
        f"quickest of {settings['rounds']} interleaved starts, of the first compiled one the only one."
    )


def kernels_rows(result: Result) -> Rows:
    rows = []
    for one in (one for one in result.measurements if one.name == "call"):
        point = {key: value for key, value in one.of.items() if key != "by"}
        taken, ours = result.median("call", **one.of), result.median("call", **point, by="ours")
        # Bytes moved in a microsecond, over those that a device copy moves.
        share = over(over(result.median("bytes", **point), taken), result.median("copy", **point))
        cells = [cell(taken, ".1f", " us"), cell(result.derived("share", share, **one.of), ".0%")]
        ratio = result.derived("this / ours", over(taken, ours), **one.of)
        rows.append([*one.of.values(), *cells, cell(ratio, ".2f", "x")])
    return ["kernel", "requests", "context", "by", "time", "bandwidth / copy's", "this / ours"], rows


def kernels_note(result: Result) -> str:
    settings = result.settings
    heads = f"{settings['heads']} query and {settings['kv_heads']} KV heads of {settings['head_dim']}"
    return (
        f"{heads}, {settings['dtype']}, a decode step in a CUDA graph, medians of {settings['rounds']} interleaved "
        "rounds. Cross attention: of one cross-decoder layer over the global cache. Window step: norm, rotation, cache "
        f"write and attention over a window of {settings['window']}, of one (iteration, layer). Global write: norm, "
        "rotation and write of a step's keys and values."
    )


TABLES = (
    Table(
        name="prefill",
        each_dtype=True,
        about="Prompts with and without skipping the cross-decoder, and the ceiling",
        needs="two quiet cores",
        takes="8 minutes",
        rows=prefill_rows,
        note=prefill_note,
    ),
    Table(
        name="prefill_node",
        each_dtype=True,
        about="Prompts on a prefill node, which runs neither cross-decoder nor head",
        needs="two quiet cores",
        takes="3 minutes",
        rows=prefill_node_rows,
        note=prefill_node_note,
    ),
    Table(
        name="dtypes",
        about="bfloat16 beside float32 on this processor",
        needs="two quiet cores",
        takes="3 minutes",
        rows=dtypes_rows,
        note=dtypes_note,
    ),
    Table(
        name="compilation",
        each_dtype=True,
        about="Decode and prefill: eager, compiled unrolled, compiled once; where a step's time goes",
        needs="two quiet cores, a C++ compiler",
        takes="8 minutes",
        rows=compilation_rows,
        note=compilation_note,
    ),
    Table(
        name="start_up",
        about="Seconds until `vllm serve` answers: eager, compiling, and with compiled code in the cache",
        needs="two quiet cores, a C++ compiler",
        takes="20 minutes",
        rows=start_up_rows,
        note=start_up_note,
    ),
    Table(
        name="kernels",
        about="The plugin's Triton kernels compared with FlashAttention, vLLM's Triton kernels and xformers",
        needs="a GPU",
        takes="minutes on a GPU, where it has not been timed",
        rows=kernels_rows,
        note=kernels_note,
        by_default=False,
    ),
)
