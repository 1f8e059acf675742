"""A new checkpoint appears whole or not at all, and is written in the memory of one shard.

Its files are written into a hidden folder next to the destination, which gets the destination's name at the very end.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from vllm_yocou.auto_classes import write_module
from vllm_yocou.checkpoints.plan import Plan, Step, refuse_existing

# What else a model's folder may hold that is still true of the new checkpoint.
COMPANIONS = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)


@contextmanager
def appearing(destination: Path) -> Iterator[Path]:
    """A hidden folder to fill, which becomes `destination` if the block ends without an error and is gone otherwise.

    Raises:
        ValueError: `destination` exists already.
    """
    refuse_existing(destination)
    unfinished = destination.with_name(f".{destination.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        # safetensors keeps its files from all but their owner, and a server may run as another user.
        readable = unfinished.stat().st_mode & 0o666
        for file in unfinished.iterdir():
            if file.is_file():
                file.chmod(readable)
        unfinished.rename(destination)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write(plan: Plan, shard_bytes: int, written: Callable[[int], None]) -> None:
    """Carry out `plan`; memory stays below one shard and one tensor.

    Args:
        shard_bytes: largest size of a file of weights, unless a single tensor is larger.
        written: is told the bytes of each tensor once it is copied.
    """
    with appearing(plan.destination) as folder:
        _write_weights(plan.steps, folder, shard_bytes, written)
        copy_companions(plan.source, folder)
        plan.config.architectures = ["YocoUForCausalLM"]
        plan.config.save_pretrained(folder)


def copy_companions(source: Path, destination: Path) -> None:
    """Copy a model's tokenizer, chat template and generation settings.

    The module that names its classes is not copied but written: it is code, and the package's own.
    """
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy(file, destination)
    write_module(destination)


def _write_weights(steps: list[Step], folder: Path, shard_bytes: int, written: Callable[[int], None]) -> None:
    by_target = {step.target: step for step in steps}
    split = split_state_dict_into_shards_factory(
        by_target,
        get_storage_size=lambda step: step.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, targets in split.filename_to_tensors.items():
        shard = {}
        for target in targets:
            step = by_target[target]
            # A copy, even where nothing changes: tensors of one storage cannot be saved.
            shard[target] = step.tensor.read().to(step.dtype, copy=True).contiguous()
            written(step.bytes)
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
