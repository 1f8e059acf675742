"""`vllm-yocou`: what a model needs, before anything is started. Errors are one line and exit code 2."""

import json
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vllm_yocou.cli import parameters
from vllm_yocou.cli.kv_bytes import KVBytes
from vllm_yocou.config import YocoUConfig

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
MIB = 1 << 20


class CacheType(StrEnum):
    """Data types of keys and values."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    fp8 = "fp8"

    @property
    def bytes(self) -> int:
        return {"float32": 4, "fp8": 1}.get(self.value, 2)


class WeightType(StrEnum):
    """Data types of weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


app = typer.Typer(add_completion=False, no_args_is_help=True, help="YOCO-U models: what they are and what they need.")
Model = Annotated[str, typer.Argument(help="Checkpoint folder, config.json or name on the Hugging Face hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def size(text: str | int) -> int:
    """A whole number, by itself or with k, m or g for powers of 1024: 256k, 40g, 40GiB."""
    found = re.fullmatch(r"(\d+)([kmg]?)(?:i?b)?", str(text).strip().lower())
    if found is None or int(found[1]) == 0:
        raise typer.BadParameter(f"'{text}' is not a positive whole number with k, m or g behind it.")
    if len(found[1]) > 15:
        raise typer.BadParameter(f"'{found[1][:15]}...' is more than anything holds.")
    return int(found[1]) * UNITS[found[2]]


def read_config(model: str) -> YocoUConfig:
    found, _ = YocoUConfig.get_config_dict(model)
    if found.get("model_type") != YocoUConfig.model_type:
        raise ValueError(
            f"{model} is of model_type '{found.get('model_type')}': give a checkpoint of '{YocoUConfig.model_type}'."
        )
    config = YocoUConfig.from_pretrained(model)
    weights = not Path(model).is_file()  # a config.json alone does not say whether a shared expert is gated
    if weights and config.leaves_gate_to_weights:
        from vllm_yocou.reference.feed_forward import has_shared_expert_gate  # torch takes seconds to import

        config.shared_expert_gate = has_shared_expert_gate(model)
    return config


@app.command()
def kv(
    model: Model,
    context: Annotated[int, typer.Option(parser=size, metavar="TOKENS", help="Tokens of a request, as 256k.")] = 32768,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at the same time.")] = 1,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks; all figures are for one rank.")] = 1,
    kv_cache_dtype: Annotated[CacheType, typer.Option(help="Data type of keys and values.")] = CacheType.bfloat16,
    budget: Annotated[
        int | None, typer.Option(parser=size, metavar="BYTES", help="KV memory of a rank, as 40g.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """KV-cache bytes of this model, of plain YOCO and of a Transformer of the same shape."""
    config = read_config(model)
    config.check_ranks(tp)
    width = kv_cache_dtype.bytes
    ways = {
        f"YOCO-U, T = {config.num_iterations}": KVBytes.yoco_u(config, width, tp),
        "YOCO, T = 1": KVBytes.yoco_u(config, width, tp, iterations=1),
        f"Transformer, {config.num_hidden_layers} layers": KVBytes.transformer(config, width, tp),
    }
    rows = []
    for name, cost in ways.items():
        request = cost.of_request(context)
        row = {
            "architecture": name,
            "global_bytes": request - cost.of_windows(context),
            "window_bytes": cost.of_windows(context),
            "request_bytes": request,
            "all_bytes": request * concurrency,
        }
        if budget is not None:
            row["tokens_in_budget"] = cost.tokens_in(budget // concurrency)
        rows.append(row)
    if as_json:
        print(json.dumps({"context": context, "concurrency": concurrency, "tp": tp, "rows": rows}, indent=2))
        return
    table = Table(title=f"KV cache of {context:,} tokens, {kv_cache_dtype.value}, a rank of {tp}")
    columns = ["architecture", "global", "windows", "a request", f"{concurrency} requests"]
    if budget is not None:
        columns.append(f"tokens a request in {budget / (1 << 30):g} GiB")
    for column in columns:
        table.add_column(column, justify="left" if column == "architecture" else "right")
    for row in rows:
        cells = [
            f"{value:,}" if key == "tokens_in_budget" else f"{value / MIB:,.1f} MiB"
            for key, value in row.items()
            if key != "architecture"
        ]
        table.add_row(row["architecture"], *cells)
    Console().print(table)


@app.command()
def info(
    model: Model,
    context: Annotated[int, typer.Option(parser=size, metavar="TOKENS", help="Context of the decoded token.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """Architecture, parameters and operations of a model."""
    config = read_config(model)
    facts = {
        "self_decoder_layers": config.num_self_decoder_layers,
        "cross_decoder_layers": config.num_cross_decoder_layers,
        "iterations": config.num_iterations,
        "sliding_window": config.sliding_window,
        "hidden_size": config.hidden_size,
        "self_decoder_heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} KV of "
        f"{config.head_dim}",
        "cross_decoder_heads": f"{config.cross_num_attention_heads} query, {config.cross_num_key_value_heads} KV of "
        f"{config.cross_head_dim}",
        "experts": f"{config.num_experts_per_tok} of {config.num_experts}" if config.is_moe else None,
        "parameters": parameters.stored(config),
        "active_parameters": parameters.active(config),
        f"flops_a_token_at_{context}": parameters.flops(config, context),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, title=escape(model))
    for name, value in facts.items():
        if value is not None:
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value)
    Console().print(table)


Destination = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write, which must not be there yet.")]
StoredType = Annotated[WeightType | None, typer.Option(help="Data type of the weights, by default as they are.")]
ShardSize = Annotated[int, typer.Option(parser=size, metavar="BYTES", help="Largest file.")]
LARGEST_SHARD = 5 << 30


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the authors' or of a 2024 YOCO checkpoint.")],
    destination: Destination,
    dtype: StoredType = None,
    shard_size: ShardSize = LARGEST_SHARD,
    context: Annotated[
        int | None, typer.Option(parser=size, metavar="TOKENS", help="Longest context, if the source does not say.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would become of every tensor.")] = False,
) -> None:
    """Write a foreign YOCO checkpoint as a YOCO-U checkpoint for this plugin."""
    from vllm_yocou.checkpoints import converter  # torch takes seconds to import

    plan = converter.plan(source, destination, dtype and dtype.value, context)
    if dry_run:
        for step in plan.steps:
            stored = f"{list(step.tensor.shape)} {step.dtype}".replace("torch.", "")
            print(f"{step.source} -> {step.target} {stored}")
        for name, reason in plan.left_out.items():
            print(f"{name} -> left out: {reason}")
        return
    write(plan, shard_size)
    for name, reason in plan.left_out.items():
        print(f"left out: {name} ({reason})")
    print(f"{destination}: {len(plan.steps)} tensors, ready for vllm serve.")


def write(plan, shard_size: int) -> None:
    """Carry out a converter.Plan behind a progress bar."""
    from vllm_yocou.checkpoints import converter

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(escape(str(plan.destination)), total=sum(step.bytes for step in plan.steps))
        converter.write(plan, shard_size, lambda written: progress.advance(task, written))


def layers(text: str) -> tuple[int, ...]:
    """Layer numbers and ranges, both ends included: 0-9,12,14."""
    found = []
    for part in str(text).split(","):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if last < first:
            raise typer.BadParameter(f"'{part}' is neither a layer's number nor a range of them, as in 0-9,12,14.")
        found.extend(range(first, last + 1))
    return tuple(found)


@app.command()
def upcycle(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a Llama in Hugging Face's format.")],
    destination: Destination,
    iterations: Annotated[int, typer.Option(min=1, help="T, how often the self-decoder runs.")],
    self_layers: Annotated[
        int | None, typer.Option(min=1, help="S, layers of the self-decoder, by default half of the source's.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="W, tokens that a self layer sees, itself included.")] = 512,
    self_from: Annotated[
        tuple | None,
        typer.Option(parser=layers, metavar="LAYERS", help="Source layers of the self layers, by default the first S."),
    ] = None,
    global_from: Annotated[
        int | None, typer.Option(min=0, help="Source layer of the global K and V, by default the first cross layer's.")
    ] = None,
    attention_from: Annotated[
        tuple | None,
        typer.Option(
            parser=layers,
            metavar="LAYERS",
            help="Source layers of the cross layers' attention, by default for each the one of the global K and V.",
        ),
    ] = None,
    cross_from: Annotated[
        tuple | None,
        typer.Option(
            parser=layers,
            metavar="LAYERS",
            help="Source layers of the cross layers' feed-forward, by default those behind the self layers'.",
        ),
    ] = None,
    cross_rope: Annotated[bool, typer.Option(help="Rotate the cross-decoder's queries and the global keys.")] = True,
    dtype: StoredType = None,
    shard_size: ShardSize = LARGEST_SHARD,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print which layer would become what.")] = False,
) -> None:
    """Make a YOCO-U checkpoint out of the layers of a Llama. It has to be trained before it is of use."""
    from vllm_yocou.checkpoints import upcycling

    plan, chosen = upcycling.plan(
        source,
        destination,
        iterations=iterations,
        window=window,
        cross_rope=cross_rope,
        dtype=dtype and dtype.value,
        self_layers=self_layers,
        self_from=self_from,
        global_from=global_from,
        attention_from=attention_from,
        cross_from=cross_from,
    )
    config = plan.config
    title = f"S = {config.num_self_decoder_layers}, T = {iterations}, W = {window}, "
    title += f"C = {config.num_cross_decoder_layers} {'with RoPE' if cross_rope else 'without RoPE'}"
    table = Table("YOCO-U", "attention, its norm", "feed-forward, its norm", title=title)
    for here, attention, feed_forward in chosen.rows():
        table.add_row(here, f"layer {attention}", "" if feed_forward is None else f"layer {feed_forward}")
    Console().print(table)
    print(f"{len(plan.left_out)} tensors of the source are not used.")
    if not dry_run:
        write(plan, shard_size)
        print(
            f"{destination}: {len(plan.steps)} tensors. Heal it with examples/training/distill.py before you serve it."
        )


def main() -> None:
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
