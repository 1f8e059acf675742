"""A converted checkpoint appears whole or not at all, and no source is ever held in memory whole.

Tensors are mapped from the source's files, written shard by shard into a folder beside the destination, and the folder
gets the destination's name at the very end. Pickles are read without executing what they hold.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_yocou.checkpoints.foreign import recognise
from vllm_yocou.checkpoints.format import deviations, expected_shapes, weight_files
from vllm_yocou.config import ROPE_TYPES, YocoUConfig
from vllm_yocou.rope import inverse_frequencies

PICKLES = (".bin", ".pt", ".pth")
# What else a model's folder may hold that stays true after conversion.
COMPANIONS = ("tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
COMPANIONS += ("chat_template*", "generation_config.json")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a source, unread: `read` maps it from its file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """One tensor's way: its name there, its name here, and how it is stored here."""

    source: str
    target: str
    tensor: SourceTensor
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.tensor.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A conversion that has been checked against the config and not begun.

    Attributes:
        source, destination: folders; the second is not there yet.
        config: of the converted checkpoint.
        steps: every tensor of the converted checkpoint, in its order.
        left_out: source tensors that hold nothing of their own, with the reason.
    """

    source: Path
    destination: Path
    config: YocoUConfig
    steps: list[Step]
    left_out: dict[str, str]


def plan(source: Path, destination: Path, dtype: str | None = None, context: int | None = None) -> Plan:
    """Find out how the checkpoint in the folder `source` becomes one of this schema in the folder `destination`.

    Args:
        dtype: of floating-point tensors, by default each one's own.
        context: longest context in tokens, for sources that do not say.

    Raises:
        ValueError: the source cannot be read, is of another kind, or its tensors do not fit its config; or
            `destination` is there already.
    """
    tensors = read_tensors(source)
    foreign = recognise(source, set(tensors), _tied(tensors), context)
    expected = expected_shapes(foreign.config)
    origins, left_out, unexpected = {}, {}, []
    for name, tensor in tensors.items():
        target = foreign.rename(name)
        if reason := redundant(name, tensor, foreign.config, is_head=target == "lm_head.weight"):
            left_out[name] = reason
        elif target in expected:
            origins[target] = name
        else:
            unexpected.append(name)
    return assemble(source, destination, foreign.config, tensors, origins, left_out, unexpected, dtype)


def redundant(name: str, tensor: SourceTensor, config: YocoUConfig, is_head: bool) -> str | None:
    """Why a tensor of a source holds nothing of its own, if it does not."""
    if name.endswith("rotary_emb.inv_freq") and _is_the_configs(tensor, config):
        return "follows from the config"
    return "a second copy of the tied embeddings" if is_head and config.tie_word_embeddings else None


def assemble(
    source: Path,
    destination: Path,
    config: YocoUConfig,
    tensors: dict[str, SourceTensor],
    origins: dict[str, str],
    left_out: dict[str, str],
    unexpected: list[str],
    dtype: str | None,
) -> Plan:
    """The plan, once every tensor there is accounted for and every tensor here has its origin there.

    Args:
        tensors: the source's, by name.
        origins: name here -> name there.
        left_out: names there -> reason.
        unexpected: names there that have no place.
        dtype: of all tensors, by default each one's own.

    Raises:
        ValueError: a tensor is missing, unexpected, misshapen or not of floating point; or `destination` is there.
    """
    if destination.exists():
        raise ValueError(f"{destination} is there already: give a folder that is not.")
    steps, missing, misshapen = [], [], []
    for target, shape in expected_shapes(config).items():
        name = origins.get(target)
        tensor = tensors.get(name)
        if tensor is None:
            missing.append(name or target)
        elif tensor.shape != shape:
            misshapen.append(f"{name} is {list(tensor.shape)} instead of {list(shape)}")
        elif not tensor.dtype.is_floating_point:
            misshapen.append(f"{name} is of {tensor.dtype}")
        else:
            steps.append(Step(name, target, tensor, DTYPES[dtype] if dtype else tensor.dtype))
    if problems := deviations(sorted(set(missing)), unexpected, misshapen):
        raise ValueError(f"the source does not fit its config, {problems}. Correct the config or the source.")
    # The format says by the weights alone whether a shared expert is gated.
    config.shared_expert_gate = None
    config.dtype = str(steps[0].dtype).removeprefix("torch.")
    return Plan(source, destination, config, steps, left_out)


def _tied(tensors: dict[str, SourceTensor]) -> bool:
    """Whether a state dict of the 2024 code has one tensor for the embeddings and the head, under both names."""
    both = [tensors.get(name) for name in ("embed_tokens.weight", "output_projection.weight")]
    return None not in both and both[0].read().data_ptr() == both[1].read().data_ptr()


def _is_the_configs(frequencies: SourceTensor, config: YocoUConfig) -> bool:
    rope = config.rope_parameters
    tables = [rope]
    if ROPE_TYPES[rope["rope_type"]]:
        # transformers once kept those of scaled types unscaled, and divided the positions.
        tables.append({"rope_type": "default", "rope_theta": rope["rope_theta"]})
    if frequencies.shape != (config.head_dim // 2,):
        return False
    found = frequencies.read().float()
    own = (inverse_frequencies(config.head_dim, table, torch.float32) for table in tables)
    return any(torch.allclose(found, expected, rtol=1e-2) for expected in own)


def read_tensors(folder: Path) -> dict[str, SourceTensor]:
    """Every tensor of the weight files in `folder`, by name."""
    files = weight_files(folder) or sorted(p for p in folder.glob("*") if p.suffix in PICKLES)
    if not files:
        raise ValueError(f"{folder} holds no weights: give a folder with *.safetensors or {', '.join(PICKLES)} files.")
    found: dict[str, SourceTensor] = {}
    for file in files:
        for name, tensor in _safetensors(file) if file.suffix == ".safetensors" else _pickled(file):
            if name in found:
                raise ValueError(
                    f"{name} is in more than one file of {folder}: merge the parts of a model-parallel run first."
                )
            found[name] = tensor
    return found


def _safetensors(path: Path) -> Iterator[tuple[str, SourceTensor]]:
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it again.") from error
    for name in file.keys():  # noqa: SIM118 (not a dictionary)
        part = file.get_slice(name)
        empty = part[:0] if part.get_shape() else file.get_tensor(name)  # for its dtype as torch has it
        yield name, SourceTensor(tuple(part.get_shape()), empty.dtype, lambda name=name: file.get_tensor(name))


def _pickled(path: Path) -> Iterator[tuple[str, SourceTensor]]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects besides tensors, and nothing of it was executed: save the bare state dict."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole file of torch.save ({str(error).splitlines()[0]}): save it again with torch 1.6 or "
            "later."
        ) from error
    tensors = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors):
        raise ValueError(f"{path} is not a dictionary of tensors alone: save the bare state dict.")
    for name, tensor in tensors:
        yield name, SourceTensor(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)


def write(plan: Plan, shard_bytes: int, written: Callable[[int], None]) -> None:
    """Carry out `plan`; `written` is told the bytes of each tensor. Memory stays below one shard and one tensor."""
    unfinished = plan.destination.with_name(f".{plan.destination.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _write_weights(plan.steps, unfinished, shard_bytes, written)
        copy_companions(plan.source, unfinished)
        plan.config.architectures = ["YocoUForCausalLM"]
        plan.config.save_pretrained(unfinished)
        unfinished.rename(plan.destination)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def copy_companions(source: Path, destination: Path) -> None:
    """Copy a model's tokenizer, chat template and generation settings."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy(file, destination)


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
