"""Tiny Llamas with random weights, what upcycling makes of them, and text to heal that with."""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_yocou.checkpoints.llama import Upcycling
from vllm_yocou.checkpoints.plan import Plan
from vllm_yocou.checkpoints.plan import plan as plan_of
from vllm_yocou.checkpoints.sources import recognise
from vllm_yocou.checkpoints.write import write

VOCABULARY = 97
TEXT = "\n".join(f"On day {day} the {beast} went over the {place}." for day in range(160) for beast in ("ox", "hen")
                 for place in ("hill", "sea"))  # fmt: skip


def save_llama(folder, shard="1GB", **changed) -> LlamaForCausalLM:
    """A random one of 5 layers, in which every layer moves the logits; norm weights away from one."""
    sizes = dict(vocab_size=VOCABULARY, hidden_size=48, intermediate_size=80, num_hidden_layers=5)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes | dict(rope_theta=5000.0, rms_norm_eps=1e-5) | changed)).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    llama.save_pretrained(folder, max_shard_size=shard)
    return llama


def upcycle(source, destination, iterations=1, window=64, shard_bytes=1 << 30, dtype=None, **chosen) -> Plan:
    plan = plan_of(recognise("upcycle", source, Upcycling(iterations, window, **chosen)), destination, dtype)
    write(plan, shard_bytes, lambda written: None)
    return plan


def save_material(folder, **changed) -> None:
    """A Llama with its tokenizer, a YOCO-U model made of it, and text in two formats; `changed` of the Llama."""
    (folder / "text.txt").write_text(TEXT)
    (folder / "text.jsonl").write_text("".join(json.dumps({"id": 0, "text": line}) + "\n" for line in TEXT.split("\n")))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    save_llama(folder / "llama", vocab_size=300, **changed)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "llama")
    upcycle(folder / "llama", folder / "made", iterations=2, window=16, dtype="bfloat16")
