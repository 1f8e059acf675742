"""A first try needs no model of one's own: the trained one from a checkout, anywhere else a random one."""

import json

import pytest
import torch
from harness.checkout import TRAINED
from harness.engines import generate
from harness.oracle import agrees
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from vllm_yocou.architecture import Architecture
from vllm_yocou.checkpoints import example
from vllm_yocou.reference import YocoUForCausalLM

# What the trained checkpoint has for readers rather than for servers.
FOR_READERS = {"README.md", "loss.png", "training.json", "training-t1.json"}
TEXT = "Grüß Gott, 世界! \x00\n\t🙂 <|user|>"
SIZES = dict(vocab_size=257, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """As in an environment, where no checkpoint stands beside the package."""
    monkeypatch.setattr(example, "TRAINED", tmp_path / "site-packages" / "examples" / "yoco-u-kjv")


@pytest.fixture
def random(installed, tmp_path):
    assert not example.write_example(tmp_path / "random")
    return tmp_path / "random"


def test_a_checkout_gives_the_trained_checkpoint(tmp_path):
    assert example.write_example(tmp_path / "made")
    served = {name: stored for name, stored in contents(TRAINED).items() if name not in FOR_READERS}
    assert contents(tmp_path / "made") == served


def test_a_random_checkpoint_is_the_same_at_every_writing(random, tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    example.write_example(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    assert contents(tmp_path / "again") == contents(random)
    assert sum(map(len, contents(random).values())) < 4 << 20


def test_a_random_checkpoint_has_every_switch_in_its_default(random):
    keys = json.loads((random / "config.json").read_text())
    default = Architecture(**SIZES, max_position_embeddings=1024, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    assert Architecture.of(keys) == default


def test_a_random_checkpoint_loads_whole(random):
    model, report = YocoUForCausalLM.from_pretrained(random, output_loading_info=True)
    assert not any(report.values())
    assert all(parameter.isfinite().all() and parameter.any() for parameter in model.parameters())
    with safe_open(random / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
    assert GenerationConfig.from_pretrained(random).eos_token_id == AutoTokenizer.from_pretrained(random).eos_token_id


def test_the_random_checkpoints_tokenizer_takes_any_text(random):
    tokenizer = AutoTokenizer.from_pretrained(random)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) == len(TEXT.encode())
    assert sorted(tokenizer.get_vocab().values()) == list(range(SIZES["vocab_size"]))
    assert tokenizer.encode(f"a{tokenizer.eos_token}")[1:] == [tokenizer.eos_token_id]
    turns = [("user", "Hi"), ("assistant", "Ho"), ("user", "?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "user: Hi<|endoftext|>assistant: Ho<|endoftext|>user: ?<|endoftext|>assistant: "


def test_what_is_there_is_not_written_over(random):
    before = contents(random)
    with pytest.raises(ValueError, match=r"random already exists: give a new folder\."):
        example.write_example(random)
    assert contents(random) == before


def test_a_failure_leaves_nothing(installed, tmp_path, monkeypatch):
    def full(folder):
        (folder / "config.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(example, "_write_random", full)
    with pytest.raises(OSError, match="No space left"):
        example.write_example(tmp_path / "made")
    assert not list(tmp_path.iterdir())


def test_vllm_answers_from_a_random_checkpoint(random, engine):
    reference = YocoUForCausalLM.from_pretrained(random, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(random)
    prompts = [tokenizer.encode(text) for text in ("In the beginning", TEXT)]
    llm = engine(random, skip_tokenizer_init=False)
    outputs = generate(llm, [{"prompt": tokenizer.decode(prompt)} for prompt in prompts], detokenize=True)
    assert [output.prompt_token_ids for output in outputs] == prompts
    agrees(reference, prompts, outputs)
    answers = [output.outputs[0] for output in outputs]
    assert [answer.text for answer in answers] == [tokenizer.decode(answer.token_ids) for answer in answers]
    assert all(answer.text.isascii() and answer.text.isprintable() for answer in answers)
