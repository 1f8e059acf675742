"""`vllm-yocou`: what a model needs, before anything is started. Errors are one line and exit code 2.

Importing this module imports neither torch nor transformers, which take seconds: each command imports what it needs.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_yocou.cli import arguments, environment, sizing
from vllm_yocou.cli.arguments import LARGEST_SHARD, CacheType, DeviceType, ServedType
from vllm_yocou.cli.config_file import read_architecture
from vllm_yocou.serving.capacity import Capacity, Load
from vllm_yocou.serving.packing import SMALLEST_BLOCK

if TYPE_CHECKING:
    from vllm_yocou.architecture import Architecture
    from vllm_yocou.checkpoints.calibration import Calibration
    from vllm_yocou.checkpoints.plan import Plan

MIB = 1 << 20
BINARY = ((1 << 40, "TiB"), (1 << 30, "GiB"), (MIB, "MiB"), (1 << 10, "KiB"))

app = typer.Typer(add_completion=False, no_args_is_help=True, help="YOCO-U models: what they are and what they need.")


@app.command()
def kv(
    model: arguments.Model,
    context: arguments.Context = 32768,
    concurrency: arguments.Concurrency = 1,
    tp: arguments.Ranks = 1,
    kv_cache_dtype: arguments.KVCacheType = CacheType.bfloat16,
    budget: arguments.Budget = None,
    device: arguments.Device = DeviceType.cuda,
    max_num_batched_tokens: arguments.Chunk = None,
    as_json: arguments.AsJson = False,
) -> None:
    """KV-cache bytes of this model, of plain YOCO and of a Transformer of the same shape.

    With a budget also the tokens of one request, and how many requests of --context run at a time: together, all in
    decode but one, and for certain, even if all are in prefill.
    """
    config = read_architecture(model)
    config.check_ranks(tp)
    width = kv_cache_dtype.bytes
    load = Load.by_default(device.value, context, config.sliding_window, max_num_batched_tokens)
    rows = []
    for way in sizing.ways(config, width, tp, SMALLEST_BLOCK[device.value]):
        row: dict[str, Any] = {"architecture": way.name} | _needs(way.bytes, context, concurrency)
        if budget is not None:
            capacity = Capacity.of(way.packing, load, budget // way.packing.block_bytes)
            row["tokens_in_budget"] = way.bytes.tokens_in(budget // concurrency)
            row |= {"together_in_budget": capacity.together, "guaranteed_in_budget": capacity.guaranteed}
        rows.append(row)
    if as_json:
        print(json.dumps({"context": context, "concurrency": concurrency, "tp": tp, "rows": rows}, indent=2))
        return
    sizes = {"global_bytes": "global", "window_bytes": "windows", "request_bytes": "a request"}
    sizes["all_bytes"] = f"{concurrency} requests"
    title = f"KV cache of {context:,} tokens, {kv_cache_dtype.value}, a rank of {tp}"
    Console().print(_figures(title, rows, sizes, lambda size: f"{size / MIB:,.1f} MiB"))
    if budget is not None:
        counts = {"tokens_in_budget": "tokens a request", "together_in_budget": "requests together"}
        counts["guaranteed_in_budget"] = "for certain"
        title = f"In {_binary(budget)} on {device.value}, {load.chunk:,} tokens a step"
        Console().print(_figures(title, rows, counts, "{:,}".format))


def _figures(title: str, rows: list[dict[str, Any]], columns: dict[str, str], shown: Callable[[int], str]) -> Table:
    table = Table("architecture", title=title)
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["architecture"], *(shown(row[key]) for key in columns))
    return table


def _binary(size: int) -> str:
    """Bytes in the largest unit of which there is at least one: 24 MiB, 1.5 GiB."""
    unit, name = next(((unit, name) for unit, name in BINARY if size >= unit), (1, "bytes"))
    return f"{size / unit:,.4g} {name}"


def _needs(cost: sizing.KVBytes, context: int, concurrency: int) -> dict[str, int]:
    """A row of `kv` in bytes."""
    request = cost.of_request(context)
    return {
        "global_bytes": request - cost.of_windows(context),
        "window_bytes": cost.of_windows(context),
        "request_bytes": request,
        "all_bytes": request * concurrency,
    }


@app.command()
def info(
    model: arguments.AnyModel = None,
    context: arguments.DecodedAt = 4096,
    as_json: arguments.AsJson = False,
) -> None:
    """Architecture, parameters and operations of a model; without one, what a bug report says about this machine."""
    if model is None:
        report = environment.describe()
        if as_json:
            print(json.dumps(report, indent=2))
        else:
            Console().print(_table_of(report))
        return
    config = read_architecture(model)
    facts: dict[str, int | str | None] = {
        "self_decoder_layers": config.num_self_decoder_layers,
        "cross_decoder_layers": config.num_cross_decoder_layers,
        "iterations": config.num_iterations,
        "sliding_window": config.sliding_window,
        "hidden_size": config.hidden_size,
        "self_decoder_heads": f"{config.num_query_heads} query, {config.num_key_value_heads} KV of {config.head_dim}",
        "cross_decoder_heads": f"{config.cross_num_query_heads} query, {config.cross_num_key_value_heads} KV of "
        f"{config.cross_head_dim}",
        "experts": f"{config.num_experts_per_tok} of {config.num_experts}" if config.is_moe else None,
        "shared_expert_gate": "left to the weights, and not counted" if config.leaves_gate_to_weights else None,
        **_switches(config),
        "parameters": sizing.stored_parameters(config),
        "active_parameters": sizing.active_parameters(config),
        "active_parameters_in_all_iterations": sizing.looped_parameters(config),
        f"flops_a_token_at_{context}": sizing.flops(config, context),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, title=escape(model))
    for name, value in facts.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value)
    Console().print(table)


def _switches(config: "Architecture") -> dict[str, str | None]:
    """What this model computes and others do not, in words; None for what is off."""
    clip, latent, dense = config.qk_clip_limit, config.moe_latent_size, config.first_k_dense_replace
    where = {"self": "in the self-decoder", "all": "in both decoders"}.get(config.qk_norm)
    kind = f"clipped to {clip:g}" if clip else "normed"
    pairs = f"{config.differential_attention}, outputs of pairs of query heads are subtracted"
    return {
        "differential_attention": pairs if config.is_differential else None,
        "gates_of_heads": "one a head" if config.headwise_glu else None,
        "attention_bias": "on queries, keys, values and outputs" if config.attention_bias else None,
        "queries_and_keys": f"{kind} {where}" if where else None,
        "swiglu_limit": f"{config.swiglu_limit:g}" if config.swiglu_limit else None,
        "experts_read": f"{latent} numbers{', normed' if config.moe_latent_norm else ''}" if latent else None,
        "dense_layers": f"the first {dense}" if dense else None,
        "router": "float32" if config.router_in_fp32 else None,
        "residual": "float32" if config.residual_in_fp32 else None,
        "logit_scale": f"{config.logit_scale:g}" if config.logit_scale != 1 else None,
    }


def _table_of(report: dict[str, dict[str, Any]]) -> Table:
    table = Table(show_header=False)
    for section, entries in report.items():
        table.add_row(f"[bold]{section}[/bold]")
        for name, value in entries.items():
            shown = ", ".join(value) if isinstance(value, list) else value
            table.add_row(escape(name), "none" if shown in (None, "") else escape(str(shown)))
        table.add_section()
    return table


@app.command()
def convert(
    source: arguments.Convertible,
    destination: arguments.Destination,
    dtype: arguments.StoredType = None,
    shard_size: arguments.ShardSize = LARGEST_SHARD,
    context: arguments.UnsaidContext = None,
    dry_run: arguments.TensorsOnly = False,
) -> None:
    """Write a foreign YOCO checkpoint as a YOCO-U checkpoint for this plugin."""
    from vllm_yocou.checkpoints.plan import plan as plan_of
    from vllm_yocou.checkpoints.sources import recognise
    from vllm_yocou.checkpoints.tensors import source_files

    source_files(source)  # a folder without weights is told so, whatever else it lacks
    plan = plan_of(recognise("convert", source, context), destination, dtype and dtype.value)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        for line in plan.account():
            print(line)
        return
    _write(plan, shard_size)
    for name, reason in plan.left_out.items():
        print(f"left out: {name} ({reason})")
    print(f"{destination}: {len(plan.steps)} tensors, ready for vllm serve.")


@app.command()
def upcycle(
    source: arguments.Upcyclable,
    destination: arguments.Destination,
    iterations: arguments.Iterations,
    self_layers: arguments.SelfLayers = None,
    window: arguments.Window = 512,
    self_from: arguments.SelfFrom = None,
    global_from: arguments.GlobalFrom = None,
    attention_from: arguments.AttentionFrom = None,
    cross_from: arguments.CrossFrom = None,
    cross_rope: arguments.CrossRope = True,
    global_kv_heads: arguments.GlobalKVHeads = None,
    calibrate: arguments.Calibrate = None,
    calibration_tokens: arguments.CalibrationTokens = 32768,
    calibration_iterations: arguments.CalibrationIterations = None,
    dtype: arguments.StoredType = None,
    shard_size: arguments.ShardSize = LARGEST_SHARD,
    dry_run: arguments.LayersOnly = False,
) -> None:
    """Make a YOCO-U checkpoint out of the layers of a Llama. It has to be trained before it is of use."""
    from vllm_yocou.checkpoints.llama import Upcycling
    from vllm_yocou.checkpoints.plan import plan as plan_of
    from vllm_yocou.checkpoints.sources import recognise

    asked = Upcycling(
        iterations=iterations,
        window=window,
        cross_rope=cross_rope,
        global_kv_heads=global_kv_heads,
        self_layers=self_layers,
        self_from=self_from,
        global_from=global_from,
        attention_from=attention_from,
        cross_from=cross_from,
    )
    recognised = recognise("upcycle", source, asked)
    plan = plan_of(recognised, destination, dtype and dtype.value)
    config = plan.config
    title = f"S = {config.num_self_decoder_layers}, T = {iterations}, W = {window}, "
    title += f"C = {config.num_cross_decoder_layers} {'with RoPE' if cross_rope else 'without RoPE'}"
    table = Table("YOCO-U", "attention, its norm", "feed-forward, its norm", title=title)
    for here, attention, feed_forward in recognised.layers:
        table.add_row(here, f"layer {attention}", "" if feed_forward is None else f"layer {feed_forward}")
    Console().print(table)
    print(f"{len(plan.left_out)} tensors of the source are not used.")
    numbers = 2 * config.cross_num_key_value_heads * config.cross_head_dim
    print(f"The global KV cache takes {2 * numbers:,} bytes a token in 16 bits.")
    if not dry_run:
        if calibrate is not None:
            from vllm_yocou.checkpoints.calibration import Calibration

            how = Calibration(calibrate, calibration_tokens, iterations=calibration_iterations)
            plan = _calibrated(plan, recognised.layers, how)
        _write(plan, shard_size)
        print(
            f"{destination}: {len(plan.steps)} tensors. Heal it with examples/training/distill.py before you serve it."
        )


@app.command()
def example(folder: arguments.Example) -> None:
    """Write a small YOCO-U checkpoint for a first `vllm serve`: a checkout's trained one, elsewhere a random one."""
    from vllm_yocou.checkpoints.example import write_example

    nonsense = "a random model, which only shows that serving works and answers nonsense"
    written = "a copy of the trained model examples/yoco-u-kjv" if write_example(folder) else nonsense
    on_cpu = "--dtype float32 --kv-cache-memory-bytes 256M"
    print(f"{folder}: {written}; serve it with: vllm serve {shlex.quote(str(folder))} (on a CPU add {on_cpu})")


@app.command()
def check(
    model: arguments.Checked = None,
    dtype: arguments.ServedIn = ServedType.auto,
    attention_backend: arguments.AttentionBackend = None,
    tensor_parallel_size: arguments.ServedRanks = 1,
    enforce_eager: arguments.Eager = False,
    compilation_config: arguments.Compilation = None,
    additional_config: arguments.Additional = None,
    as_json: arguments.AsJson = False,
) -> None:
    """Serve tiny models, or a checkpoint, and compare with the reference model: is this machine exact?"""
    machine, checkpoint = environment.describe(), None
    if model is not None:
        architecture = read_architecture(model)
        checkpoint = (model, sizing.stored_parameters(architecture))
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine is in this process, where it can be looked at
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings of every CPU start look like findings
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with _output_to_stderr() as out:
        from vllm_yocou.self_check.check import check as check_served
        from vllm_yocou.self_check.engine import Settings

        def say(line: str) -> None:
            if not as_json:
                print(line, file=out, flush=True)

        settings = Settings(
            dtype.value,
            attention_backend,
            tensor_parallel_size,
            enforce_eager,
            compilation_config or {},
            additional_config or {},
        )
        report = check_served(machine, settings, checkpoint, say)
        print(json.dumps(report.as_json(), indent=2) if as_json else report.verdict(), file=out, flush=True)
    if not report.is_exact:
        raise typer.Exit(1)


@contextmanager
def _output_to_stderr() -> Iterator[IO[str]]:
    """Standard output for the command alone: what vLLM, its workers and compilers print goes where errors go."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w") as out:
            yield out
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def _calibrated(plan: "Plan", layers: Sequence[tuple[str, int, int | None]], how: "Calibration") -> "Plan":
    """The plan with a model that is fitted to the source, with a progress bar."""
    from transformers.utils.logging import disable_progress_bar

    from vllm_yocou.checkpoints.calibration import calibrated

    disable_progress_bar()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("calibrating", total=1)
        return calibrated(plan, layers, how, lambda share: progress.update(task, completed=share))


def _write(plan: "Plan", shard_size: int) -> None:
    """Carry out a plan, with a progress bar."""
    from vllm_yocou.checkpoints.write import write

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(escape(str(plan.destination)), total=sum(step.bytes for step in plan.steps))
        write(plan, shard_size, lambda written: progress.advance(task, written))


def main() -> None:
    """The command's entry point: it exits with 0, or with 2 after one line."""
    try:
        sys.exit(app(standalone_mode=False))
    except typer.Abort:
        complaint = "interrupted."
    except typer.TyperException as error:
        complaint = error.format_message()
    except (ValueError, OSError) as error:
        complaint = str(error)
    except Exception as error:  # what transformers and torch raise for files that nobody foresaw
        complaint = f"{type(error).__name__}: {error}"
    if complaint:
        print(f"vllm-yocou: {' '.join(complaint.split())}", file=sys.stderr)
    sys.exit(2)
