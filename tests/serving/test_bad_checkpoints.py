"""Damaged checkpoints end in a sentence before a server is ready, or serve what the reference makes of the same file.

Most of them meet the checking functions alone. Some twenty of each kind are read next to a running engine as a start
does it, from the config to the last tensor, and all that pass are served. Two servers show that the sentence is what a
user gets, and that nothing hangs.
"""

import json
import random
import re
import subprocess

import pytest
import torch
from harness import tiny
from harness.engines import generate
from harness.oracle import agrees
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model

from benchmarks.server import READY, VLLM, free_port, user_environment
from vllm_yocou.checkpoints.format import expected_shapes
from vllm_yocou.checkpoints.verify import check_files, verified
from vllm_yocou.reference import YocoUForCausalLM

CONFIG = tiny.config(qk_norm="all")
NAMES = sorted(expected_shapes(CONFIG))
KINDS = sorted({name.replace("layers.1", "layers.0") for name in NAMES})
PROMPTS = [tiny.prompt(length) for length in (1, 40)]
FLIPS, STARTS = 400, 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sound checkpoint in one file."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.model(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(whole, module_engine):
    return module_engine(whole, kv_cache_memory_bytes=16 << 20)


@pytest.fixture
def folder(whole, tmp_path):
    """A copy to damage."""
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def check(folder) -> None:
    """What the checks of a start read, without vLLM."""
    check_files(folder)
    list(verified(load_file(folder / "model.safetensors").items(), CONFIG))


def load(folder) -> None:
    """What a start does with a checkpoint, on the ranks that the engine has set up."""
    arguments = EngineArgs(str(folder), skip_tokenizer_init=True, dtype="float32", compilation_config={"mode": 0})
    vllm_config = arguments.create_engine_config()
    with set_current_vllm_config(vllm_config):
        get_model(vllm_config=vllm_config)


def refusal(llm, folder) -> str:
    with pytest.raises(ValueError, match=r"\w") as refused:
        load(folder)
    # vLLM checks its own configs with pydantic, which puts a line before the sentence and one after it.
    lines = [line.strip() for line in str(refused.value).splitlines() if "vllm" not in line and "pydantic" not in line]
    return next((line for line in lines if str(folder) in line or "the checkpoint" in line), "\n".join(lines))


def rewrite(folder, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def serves_the_references(llm, folder) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    llm.reset_prefix_cache()
    agrees(YocoUForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), PROMPTS, generate(llm, PROMPTS))


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


DAMAGES = {
    "half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte long": lambda data: data + b"x",
    "empty": lambda data: b"",
    "half a header": lambda data: data[: header_size(data) // 2],
    "header alone": lambda data: data[: header_size(data)],
    "zeros": lambda data: bytes(len(data)),
    "another format": lambda data: b"<html>Sign in to download</html>",
    "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6206608\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(llm, folder, damage):
    file = folder / "model.safetensors"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert f"{file} cannot be read (" in refusal(llm, folder)


def test_a_flipped_bit_in_a_header_is_refused_or_does_nothing(llm, folder):
    file = folder / "model.safetensors"
    data, draw, refused, passed = file.read_bytes(), random.Random(0), {}, []
    for bit in [*range(64), *draw.sample(range(64, 8 * header_size(data)), FLIPS)]:
        file.write_bytes(flipped(data, bit))
        try:
            check(folder)
        except ValueError as error:
            refused[bit] = str(error)
        else:
            passed.append(bit)
    assert len(refused) > FLIPS - 20
    assert passed
    for sentence in refused.values():
        assert any(words in sentence for words in (f"{file} cannot be read (", "does not fit its config.json"))
    for bit in draw.sample(sorted(refused), STARTS):
        file.write_bytes(flipped(data, bit))
        assert refused[bit] in refusal(llm, folder)
    for bit in passed:
        file.write_bytes(flipped(data, bit))
        load(folder)
        serves_the_references(llm, folder)


UP = "model.self_decoder.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "name, bit", [("model.norm.weight", 22), ("model.norm.weight", 31), (UP, 0), (UP, 29), (UP, 30)], ids=str
)
def test_a_flipped_bit_in_a_number_serves_what_is_written(llm, folder, name, bit):
    """Nobody can see that it was another one; the highest bit but the sign makes some 10^37 of it."""
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(torch.tensor(1 << bit if bit < 31 else -(1 << 31)))
    rewrite(folder, **{name: tensor})
    load(folder)
    serves_the_references(llm, folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_tensor_is_named(llm, folder, name):
    rewrite(folder, **{name: None})
    assert f"missing: {name}." in refusal(llm, folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_number_that_is_none_is_named(llm, folder, name):
    tensor = load_file(folder / "model.safetensors")[name]
    tensor.view(-1)[-1] = {0: float("nan"), 1: float("inf"), 2: -float("inf")}[KINDS.index(name) % 3]
    rewrite(folder, **{name: tensor})
    assert f"the checkpoint holds NaN or infinity in {name}:" in refusal(llm, folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_shape_is_named(llm, folder, name):
    tensors = load_file(folder / "model.safetensors")
    tensor = tensors[name]
    shapes = (tensor[:-1], tensor[None], tensor.new_zeros(()), tensor.new_zeros(0))
    for wrong in shapes:
        with pytest.raises(ValueError, match=re.escape(f"{name} is {list(wrong.shape)} instead of {[*tensor.shape]}")):
            list(verified((tensors | {name: wrong}).items(), CONFIG))
    wrong = shapes[KINDS.index(name) % len(shapes)]
    rewrite(folder, **{name: wrong})
    assert f"{name} is {list(wrong.shape)} instead of {list(tensor.shape)}" in refusal(llm, folder)


def test_whole_numbers_are_no_weights(llm, folder):
    name = "model.norm.weight"
    rewrite(folder, **{name: torch.ones(CONFIG.hidden_size, dtype=torch.int32)})
    assert f"misshapen: {name} is of torch.int32" in refusal(llm, folder)


def test_an_extra_tensor_is_named(llm, folder):
    rewrite(folder, **{"model.self_decoder.layers.0.self_attn.q_proj.bias": torch.zeros(128)})
    assert "unexpected: model.self_decoder.layers.0.self_attn.q_proj.bias." in refusal(llm, folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_numbers_of_every_size_are_looked_at(dtype):
    tensors = dict(tiny.model(CONFIG).to(dtype).state_dict())
    assert len(list(verified(tensors.items(), CONFIG))) == len(NAMES)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].clone()
    tensors["model.norm.weight"][5] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in model\.norm\.weight:"):
        list(verified(tensors.items(), CONFIG))


INDICES = {
    "no JSON": '{"weight_map": {',
    "no map": "{}",
    "a list": "[1]",
    "a map of numbers": '{"weight_map": {"model.norm.weight": 5}}',
    "binary": b"\xff\xfe",
}


@pytest.mark.parametrize("index", INDICES)
def test_a_damaged_index_is_named(llm, folder, index):
    file, content = folder / "model.safetensors.index.json", INDICES[index]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert f"{file} is not an index of safetensors files" in refusal(llm, folder)


def test_shards(llm, folder):
    (folder / "model.safetensors").unlink()
    YocoUForCausalLM(CONFIG).save_pretrained(folder, max_shard_size="300KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    load(folder)
    serves_the_references(llm, folder)
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:-4])
    assert f"{shards[1]} cannot be read (" in refusal(llm, folder)
    shards[1].unlink()
    assert f"{shards[1]} cannot be read (" in refusal(llm, folder)


def test_files_that_a_start_does_not_read_are_not_looked_at(llm, folder):
    """A hidden file, another model's next to an index, and all of them where weights are random or lie elsewhere."""
    (folder / "._model.safetensors").write_bytes(b"of another system")
    load(folder)
    (folder / "adapter.safetensors").write_bytes(b"of another model")
    names = dict.fromkeys(NAMES, "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    load(folder)
    (folder / "model.safetensors").unlink()
    assert f"{folder / 'model.safetensors'} cannot be read (" in refusal(llm, folder)
    EngineArgs(str(folder), skip_tokenizer_init=True, load_format="dummy").create_engine_config()
    config = EngineArgs(str(folder), skip_tokenizer_init=True, load_format="dummy").create_model_config()
    config.model_weights = "s3://bucket/model"
    VllmConfig(model_config=config)


@pytest.mark.parametrize("key", ["vocab_size", "num_iterations", "head_dim", "rope_theta"])
def test_nonsense_in_config_json(llm, folder, key):
    """test_config.py has every key; this is the way to the user."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": None, key: -3}))
    assert f"{key} is -3: it must be a " in refusal(llm, folder)


def ends_with(sentence: str, folder) -> None:
    """A server over the checkpoint in `folder` says the sentence and ends before it is ready."""
    settings = "--skip-tokenizer-init --dtype float32 --kv-cache-memory-bytes 16M --host 127.0.0.1 --enforce-eager"
    command = [
        "timeout",
        "--kill-after=10",
        "240",
        VLLM,
        "serve",
        str(folder),
        *settings.split(),
        "--port",
        str(free_port()),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, env=user_environment())
    said = ended.stdout + ended.stderr
    assert ended.returncode not in (0, 124, 137), "it hung"
    assert sentence in said
    assert READY not in said


def test_a_server_over_nan_ends_before_it_is_ready(starts_vllm, nightly, folder):
    """The engine's own process finds it."""
    rewrite(folder, **{"model.norm.weight": torch.full((CONFIG.hidden_size,), float("nan"))})
    ends_with("the checkpoint holds NaN or infinity in model.norm.weight:", folder)


def test_a_server_over_half_a_file_ends_before_it_is_ready(starts_vllm, nightly, folder):
    """The command that parses the flags finds it."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    ends_with(f"{file} cannot be read (", folder)
