"""What the arguments of `vllm-yocou` may be; an impossible one ends in a sentence that names it.

Nothing here imports torch: every command parses its arguments with this, `--help` included.
"""

import json
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vllm_yocou.checkpoints.sources import names

UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class CacheType(StrEnum):
    """Data types of keys and values."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    fp8 = "fp8"

    @property
    def bytes(self) -> int:
        return {"float32": 4, "fp8": 1}.get(self.value, 2)


class DeviceType(StrEnum):
    """Kinds of device that vLLM chooses different settings for."""

    cuda = "cuda"
    cpu = "cpu"


class WeightType(StrEnum):
    """Data types of weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class ServedType(StrEnum):
    """Data types of a served model."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def size(text: str | int) -> int:
    """A whole number, by itself or with k, m or g for powers of 1024: 256k, 40g, 40GiB."""
    found = re.fullmatch(r"(\d+)([kmg]?)(?:i?b)?", str(text).strip().lower())
    if found is None or int(found[1]) == 0:
        raise typer.BadParameter(f"'{text}' is not a positive whole number, which k, m or g may follow.")
    if len(found[1]) > 15:
        raise typer.BadParameter(f"'{found[1][:15]}...' is more than anything holds.")
    return int(found[1]) * UNITS[found[2]]


def json_object(text: str | dict) -> dict:
    """One JSON object."""
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"'{text}' is not a JSON object, as in '{{\"cudagraph_mode\": \"PIECEWISE\"}}'.")
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Numbers and ranges, both ends included: 0-9,12,14."""
    found: list[int] = []
    for part in str(text).split(","):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if last < first:
            raise typer.BadParameter(f"'{part}' is neither a number nor a range of numbers, as in 0-9,12,14.")
        found.extend(range(first, last + 1))
    return tuple(found)


Model = Annotated[str, typer.Argument(help="Checkpoint folder, config.json or name on the Hugging Face hub.")]
AnyModel = Annotated[
    str | None,
    typer.Argument(help="Same as for kv. Without it, info describes this machine, for a bug report."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Context = Annotated[int, typer.Option(parser=size, metavar="TOKENS", help="Tokens of a request, as 256k.")]
DecodedAt = Annotated[int, typer.Option(parser=size, metavar="TOKENS", help="Context of the decoded token.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests at the same time.")]
Ranks = Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks; all figures are for one rank.")]
KVCacheType = Annotated[CacheType, typer.Option(help="Data type of keys and values.")]
Budget = Annotated[int | None, typer.Option(parser=size, metavar="BYTES", help="KV memory of a rank, as 40g.")]
Device = Annotated[DeviceType, typer.Option(help="What the model is served on; counts with --budget alone.")]
Chunk = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens",
        parser=size,
        metavar="TOKENS",
        help="vLLM's; counts with --budget alone. By default 8192 on CUDA and 1024 on a CPU.",
    ),
]

Convertible = Annotated[Path, typer.Argument(metavar="SRC", help=f"Folder of {names('convert')}.")]
Upcyclable = Annotated[Path, typer.Argument(metavar="SRC", help=f"Folder of {names('upcycle')}.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="Folder to write, which must not be there yet.")]
StoredType = Annotated[WeightType | None, typer.Option(help="Data type of the weights, by default as they are.")]
ShardSize = Annotated[int, typer.Option(parser=size, metavar="BYTES", help="Largest file.")]
LARGEST_SHARD = 5 << 30
UnsaidContext = Annotated[
    int | None, typer.Option(parser=size, metavar="TOKENS", help="Longest context, if the source does not say.")
]
TensorsOnly = Annotated[bool, typer.Option("--dry-run", help="Print what would become of every tensor.")]

Example = Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write, which must not be there yet.")]

Checked = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Checkpoint to check, as a folder or a name on the hub; without it three tiny models."
    ),
]
ServedIn = Annotated[
    ServedType, typer.Option(help="vLLM's; for the tiny models on a CPU auto is float32.", show_default=True)
]
AttentionBackend = Annotated[str | None, typer.Option(metavar="NAME", help="vLLM's.")]
ServedRanks = Annotated[int, typer.Option(min=1, help="vLLM's.")]
Eager = Annotated[bool, typer.Option("--enforce-eager", help="vLLM's.")]
Compilation = Annotated[dict | None, typer.Option(parser=json_object, metavar="JSON", help="vLLM's.")]
Additional = Annotated[
    dict | None, typer.Option(parser=json_object, metavar="JSON", help="vLLM's, with the plugin's options.")
]

Iterations = Annotated[int, typer.Option(min=1, help="T, how often the self-decoder runs.")]
SelfLayers = Annotated[
    int | None, typer.Option(min=1, help="S, layers of the self-decoder, by default half of the source's.")
]
Window = Annotated[int, typer.Option(min=1, help="W, tokens that a self layer sees, itself included.")]
SelfFrom = Annotated[
    tuple | None,
    typer.Option(parser=numbers, metavar="LAYERS", help="Source layers of the self layers, by default the first S."),
]
GlobalFrom = Annotated[
    int | None, typer.Option(min=0, help="Source layer of the global K and V, by default the first cross layer's.")
]
AttentionFrom = Annotated[
    tuple | None,
    typer.Option(
        parser=numbers,
        metavar="LAYERS",
        help="Source layers of the cross layers' attention, by default for each the one of the global K and V.",
    ),
]
CrossFrom = Annotated[
    tuple | None,
    typer.Option(
        parser=numbers,
        metavar="LAYERS",
        help="Source layers of the cross layers' feed-forward, by default those after the self layers'.",
    ),
]
CrossRope = Annotated[bool, typer.Option(help="Rotate the cross-decoder's queries and the global keys.")]
GlobalKVHeads = Annotated[
    int | None,
    typer.Option(min=1, help="Heads of the global K and V: a multiple of the source's, by default as many."),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        metavar="TEXT",
        help="Prose in UTF-8, on which the model is fitted to the source.",
    ),
]
CalibrationTokens = Annotated[
    int,
    typer.Option(
        min=1, help="Tokens of TEXT that are taken from its beginning, in rows of 512; counts with --calibrate alone."
    ),
]
CalibrationIterations = Annotated[
    tuple | None,
    typer.Option(
        parser=numbers,
        metavar="NUMBERS",
        help="Every T that the model is fitted for, such as 1-3, by default its own alone; counts with --calibrate.",
    ),
]
LayersOnly = Annotated[bool, typer.Option("--dry-run", help="Print which layer would become what.")]
