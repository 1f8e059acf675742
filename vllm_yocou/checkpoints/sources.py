"""The schemas that `vllm-yocou` makes YOCO-U checkpoints from, one entry for each.

Nothing here imports the modules of the schemas before a folder asks for one: the command line prints its help from
SOURCES, and torch takes seconds to import.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_yocou.checkpoints.mapping import Source


@dataclass(frozen=True)
class Schema:
    """A schema that checkpoints come in.

    Attributes:
        module: the name of its module in this package.
        command: which command of `vllm-yocou` reads it.
        file: the JSON file that its config is in.
        name: what it is, for the command line's help.
        mark: how its config tells it from others, for errors.
    """

    module: str
    command: str
    file: str
    name: str
    mark: str


SOURCES = (
    Schema(
        module="yoco2024",
        command="convert",
        file="params.json",
        name="a checkpoint of the 2024 YOCO code",
        mark="the 2024 code's params.json",
    ),
    Schema(
        module="authors",
        command="convert",
        file="config.json",
        name="a checkpoint of the authors' serving fork",
        mark="the authors' 'yoco' (with yoco_cross_layers)",
    ),
    Schema(
        module="authors_trainer",
        command="convert",
        file="metadata.json",
        name="a state dict of the authors' trainer",
        mark="their trainer's metadata.json (with modelargs)",
    ),
    Schema(
        module="llama",
        command="upcycle",
        file="config.json",
        name="a Llama in Hugging Face's format",
        mark="'llama'",
    ),
)


def names(command: str) -> str:
    """What `command` of `vllm-yocou` reads, as its help says it."""
    return " or ".join(schema.name for schema in _read_by(command))


def json_object(path: Path) -> dict[str, Any]:
    """The content of a model's JSON file, or ValueError if it is anything but an object."""
    try:
        keys = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is not JSON ({error}): copy it again.") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{path} is not a JSON object: give a folder with the model's own {path.name}.")
    return keys


def recognise(command: str, folder: Path, asked: Any) -> "Source":
    """The checkpoint in `folder`, by the first schema of `command` that accepts it.

    Args:
        asked: what the user chose, as the schema's `recognise` takes it.

    Raises:
        ValueError: no schema accepts it, or the one that does refuses its contents.
    """
    found: dict[str, dict[str, Any]] = {}
    for schema in _read_by(command):
        path = folder / schema.file
        if not path.exists():
            continue
        found[schema.file] = keys = json_object(path)
        source = import_module(f"vllm_yocou.checkpoints.{schema.module}").recognise(folder, keys, asked)
        if source is not None:
            return source
    if not found:
        files = list(dict.fromkeys(schema.file for schema in _read_by(command)))
        lacking = f"neither {' nor '.join(files)}" if len(files) > 1 else f"no {files[0]}"
        raise ValueError(f"{folder} has {lacking}: give the folder of {names(command)}.")
    model_type = next(iter(found.values())).get("model_type")
    marks = " or ".join(schema.mark for schema in _read_by(command))
    raise ValueError(f"the source is of model_type '{model_type}': {command} makes YOCO-U from {marks}.")


def _read_by(command: str) -> Iterator[Schema]:
    return (schema for schema in SOURCES if schema.command == command)
