"""A checkpoint for a first try: the repository's trained one where it is at hand, elsewhere a random one.

The installed package holds no weights. A random checkpoint is the same at every writing, and none of its files is
downloaded: its tokenizer has a token for each byte and one for the end of a text.
"""

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from vllm_yocou.checkpoints.tensors import weight_files
from vllm_yocou.checkpoints.write import appearing, copy_companions
from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference import YocoUForCausalLM

TRAINED = Path(__file__).parents[2] / "examples" / "yoco-u-kjv"
END = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONTEXT = 1024
SEED = 0
READABLE = "".join(map(chr, range(32, 127)))
SHARPNESS = 20  # logits then deviate by 4.5 from the zero of an unreadable token


def write_example(destination: Path) -> bool:
    """Write a checkpoint that can be served, and return whether it is the trained one.

    Raises:
        ValueError: `destination` exists already.
    """
    trained = (TRAINED / "config.json").is_file()
    with appearing(destination) as folder:
        if trained:
            _copy(TRAINED, folder)
        else:
            _write_random(folder)
    return trained


def _copy(checkpoint: Path, folder: Path) -> None:
    for file in (checkpoint / "config.json", *checkpoint.glob("*.py"), *weight_files(checkpoint)):
        shutil.copy(file, folder)
    copy_companions(checkpoint, folder)


def _write_random(folder: Path) -> None:
    tokenizer = _tokenizer()
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    # Every switch has its default. A head is of 32 numbers, the fewest that vLLM's CPU attention takes.
    config = YocoUConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = YocoUForCausalLM(config)
    _prefer_readable(model, tokenizer)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)


def _prefer_readable(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Leave printable ASCII and the end as the likely tokens.

    Bytes that make no whole character are held back by vLLM: an answer of them is an empty text.
    """
    readable = [tokenizer.eos_token_id, *tokenizer.encode(READABLE)]
    with torch.no_grad():
        chosen = model.lm_head.weight[readable] * SHARPNESS
        model.lm_head.weight.zero_()
        model.lm_head.weight[readable] = chosen


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: token 0 ends a text, tokens 1 to 256 are the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )
