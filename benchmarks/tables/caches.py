"""What the KV cache costs: bytes by layout, scheduling by its groups, and the chunk that a prompt is computed in."""

from benchmarks.results import Result
from benchmarks.tables.table import Rows, Table, cell, over


def kv_layout_rows(result: Result) -> Rows:
    lengths = result.keys("tokens")
    longest = max(lengths)
    rows = []
    for shape in result.keys("shape"):
        for layout in result.keys("layout"):
            of = dict(shape=shape, layout=layout)
            block = over(result.median("block", **of), 1 << 10)
            sizes = [result.median("KV cache", **of, tokens=tokens) for tokens in lengths]
            per_gib = result.derived("tokens per GiB", over(longest << 10, sizes[-1]), **of)
            cells = [cell(result.median("KV groups", **of)), cell(block, ".0f", " KiB")]
            cells += [cell(result.median("global tokens of a block", **of))]
            cells += [cell(size, ".2f", " MiB") for size in sizes]
            rows.append([shape, layout, *cells, cell(per_gib and int(per_gib), ",")])
    header = ["shape", "layout", "KV groups", "block", "its global tokens"]
    return [*header, *(f"{tokens} tokens" for tokens in lengths), f"tokens per GiB at {longest}"], rows


def kv_layout_note(result: Result) -> str:
    return f"{result.settings['dtype']}, one request in decode, blocks counted in vLLM's pool."


def scheduling_rows(result: Result) -> Rows:
    layouts = result.keys("layout")
    rows = []
    for batch in result.keys("batch"):
        totals, cells = {}, []
        for layout in layouts:
            of = dict(batch=batch, layout=layout)
            parts = [result.median(part, **of) for part in ("scheduling", "input preparation")]
            known = [part for part in parts if part is not None]
            totals[layout] = result.derived("both", sum(known), **of)
            each = f" ({' + '.join(f'{part:.2f}' for part in known)})" if known else ""
            cells.append(cell(totals[layout], ".2f", f" ms{each}"))
        ratio = result.derived("naive / packed", over(totals["naive"], totals["packed"]), batch=batch)
        rows.append([batch, *cells, cell(ratio, ".1f", "x")])
    groups = result.settings["groups"]
    return ["batch", *(f"{layout}, {groups[layout]} groups" for layout in layouts), "naive / packed"], rows


def scheduling_note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['window_caches']} window caches, one thread, a decode step without the model: scheduling + input "
        f"preparation, medians of {settings['rounds']} interleaved rounds of {settings['steps']} steps. Naive is the "
        "plugin with `max_global_block` 1."
    )


def chunk_size_rows(result: Result) -> Rows:
    chunks = result.keys("chunk")
    rows = []
    for chunk in chunks:
        held, taken = result.median("KV cache held at most", chunk=chunk), result.median("prefill", chunk=chunk)
        speed = result.derived("speed", over(result.median("prefill", chunk=max(chunks)), taken), chunk=chunk)
        rows.append([chunk, cell(held, ".1f", " MiB"), cell(taken, ".2f", " s"), cell(speed, ".2f", "x")])
    return ["tokens a step", "KV cache held at most", "prefill", f"speed against {max(chunks)}"], rows


def chunk_size_note(result: Result) -> str:
    settings = result.settings
    return (
        f"{settings['shape']} shape, {settings['dtype']}, a prompt of {settings['tokens']} tokens, medians of "
        f"{settings['rounds']} interleaved rounds."
    )


def moved_kv_rows(result: Result) -> Rows:
    kinds = result.keys("what")
    rows = []
    for tokens in result.keys("tokens"):
        sizes = [result.median("moved", tokens=tokens, what=what) for what in kinds]
        ratios = {what: over(size, sizes[0]) for what, size in zip(kinds[1:], sizes[1:], strict=True)}
        found = [result.derived("times as many", ratio, tokens=tokens, what=what) for what, ratio in ratios.items()]
        cells = [cell(size, ",.1f", " MiB") for size in sizes]
        others = [f"{size} ({cell(ratio, '.1f', 'x')})" for size, ratio in zip(cells[1:], found, strict=True)]
        rows.append([f"{tokens:,}", cells[0], *others])
    return ["tokens", *kinds], rows


def moved_kv_note(result: Result) -> str:
    return (
        f"{result.settings['shape']} shape, {result.settings['dtype']}. Blocks are counted in vLLM's pool after the "
        "prompt: the whole global cache, and of each window cache the pages of the last window."
    )


TABLES = (
    Table(
        name="kv_layout",
        about="KV cache groups and bytes of a request: one group a cache, packed, and the paper's formula",
        needs="nothing",
        takes="1 minute",
        rows=kv_layout_rows,
        note=kv_layout_note,
    ),
    Table(
        name="moved_kv",
        about="Bytes of a request that a KV connector moves, by its length",
        needs="nothing",
        takes="half a minute",
        rows=moved_kv_rows,
        note=moved_kv_note,
    ),
    Table(
        name="scheduling",
        about="What a decode step costs outside the model, with naive and with packed KV groups",
        needs="a quiet core",
        takes="3 minutes",
        rows=scheduling_rows,
        note=scheduling_note,
    ),
    Table(
        name="chunk_size",
        each_dtype=True,
        about="KV cache and time of a long prompt by --max-num-batched-tokens",
        needs="two quiet cores",
        takes="5 minutes",
        rows=chunk_size_rows,
        note=chunk_size_note,
    ),
)
