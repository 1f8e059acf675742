"""YOCO-U compared with what people would serve instead, in the same vLLM: Transformers, and vLLM's looped models.

Peers have the width, heads and feed-forward of YOCO-U. One Transformer has as many layers as YOCO-U has layer passes,
S·T + C, another as many as YOCO-U stores, S + C. The looped ones are YOCO-U with a KV cache group for each cache, and
vLLM's IQuestLoopCoder, whose S + C layers run twice, the second time over a window. Chunks are the defaults: the
plugin's for YOCO-U, vLLM's for the others. With --paper the shape is the paper's, on a GPU.
"""

from benchmarks.engine import (
    LAYOUTS,
    block_bytes,
    config,
    core,
    decoding,
    prompt_s,
    start,
    step_s,
    steps_of_prompts,
)

import argparse
import dataclasses
import sys
from contextlib import ExitStack
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig
from vllm import LLM

from benchmarks.console import progress, publish
from benchmarks.kv_layout import held_in_decode
from benchmarks.precision import in_each_dtype
from benchmarks.results import Result
from benchmarks.tables.comparisons import LIKE_PAPER, LOOPED, OURS, UNPACKED
from vllm_yocou.cli.sizing import KVBytes, stored_parameters

MARGIN = 4096  # tokens that a request has room for beyond its prompt, or in flight in a window cache


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a table: prompt rounds by length in tokens, requests of the decode steps, and what a pool must hold.

    All requests of the largest batch fit at `together` tokens, one of them at the longest length.
    """

    table: str
    shape: str
    dtype: str
    prompts: dict[int, int]
    batches: tuple[int, ...]
    together: int
    budget_gib: int
    changed: dict[str, Any]


SMALL = Sizes(
    "peers",
    "57M",
    "float32",
    {1 << 10: 5, 4 << 10: 3, 16 << 10: 3},
    (1, 8),
    16 << 10,
    1,
    dict(num_key_value_heads=2),
)
PAPER = Sizes(
    "peers_paper",
    "paper 1.3B",
    "bfloat16",
    {1 << 10: 5, 4 << 10: 5, 8 << 10: 5, 16 << 10: 3, 64 << 10: 3, 256 << 10: 1},
    (1, 8),
    64 << 10,
    80,
    {},
)
PAPER_GPU_BYTES = 125 << 30
STEPS, ROUNDS = 8, 3


def our_pool(sizes: Sizes) -> dict[str, Any]:
    """Room for YOCO-U's caches."""
    cfg, batch, longest = config(sizes.shape, **sizes.changed), max(sizes.batches), max(sizes.prompts) + MARGIN
    kv = KVBytes.yoco_u(cfg, getattr(torch, sizes.dtype).itemsize)
    in_flight = kv.window_token * (cfg.sliding_window + MARGIN)
    return dict(kv_cache_memory_bytes=batch * (kv.token * longest + in_flight))


def pool(sizes: Sizes, layers: float) -> dict[str, Any]:
    """Room for the caches of so many layers, each of which holds all tokens."""
    cfg, batch, longest = config(sizes.shape, **sizes.changed), max(sizes.batches), max(sizes.prompts) + MARGIN
    whole = KVBytes.transformer(cfg, getattr(torch, sizes.dtype).itemsize)
    token_bytes = whole.token // cfg.num_hidden_layers * layers
    return dict(kv_cache_memory_bytes=int(token_bytes * max(longest, batch * (sizes.together + MARGIN))))


def peers(sizes: Sizes) -> dict[str, tuple[PretrainedConfig, dict[str, Any]]]:
    """Config and engine settings by name."""
    cfg, room = config(sizes.shape, **sizes.changed), our_pool(sizes)
    layers, passes = cfg.num_hidden_layers, cfg.num_iterations * cfg.num_self_decoder_layers

    def llama(layers: int, architecture: str = "LlamaForCausalLM", **more: Any) -> LlamaConfig:
        same = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim rms_norm_eps"
        kept = {key: getattr(cfg, key) for key in (*same.split(), "max_position_embeddings")}
        return LlamaConfig(**kept, num_hidden_layers=layers, architectures=[architecture], **more)

    deep = passes + cfg.num_cross_decoder_layers
    naive = dict(additional_config={"yocou": LAYOUTS["naive"]})
    looped = llama(layers, "IQuestLoopCoderForCausalLM", loop_num=2, loop_window_size=cfg.sliding_window)
    return {
        OURS: (cfg, room),
        "Transformer, S·T + C layers": (llama(deep), pool(sizes, deep)),
        LIKE_PAPER: (llama(layers), pool(sizes, layers)),
        UNPACKED: (cfg, room | naive),
        LOOPED: (looped, pool(sizes, 1.25 * layers)),
    }


def prefill(engines: dict[str, LLM], prompts: dict[int, int]) -> dict[int, dict[str, list[float]]]:
    """Seconds to the first token, by length and engine."""
    for llm in engines.values():
        prompt_s(llm, min(prompts))
    taken: dict[int, dict[str, list[float]]] = {tokens: {name: [] for name in engines} for tokens in prompts}
    for tokens, rounds in prompts.items():
        for number in range(rounds):
            progress(f"prompts of {tokens} tokens, round {number + 1} of {rounds}")
            for name, llm in engines.items():
                taken[tokens][name].append(prompt_s(llm, tokens))
    return taken


def decode(engines: dict[str, LLM], context: int, batch: int) -> dict[str, list[float]]:
    """Seconds of steps by engine, where its pool holds so many requests."""
    progress(f"decode at {context} tokens, batch {batch}")
    taken: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for name, llm in engines.items():
            pool = core(llm).scheduler.kv_cache_config.num_blocks
            longest = context + STEPS * ROUNDS + steps_of_prompts(llm, batch, context)
            if held_in_decode(llm, longest) * batch < pool:
                stack.enter_context(decoding(llm, batch, context, STEPS * ROUNDS + 8))
                taken[name] = []
        for _ in range(ROUNDS):
            for name, times in taken.items():
                times += [step_s(engines[name]) for _ in range(STEPS)]
    return taken


def described(sizes: Sizes) -> dict[str, Any]:
    """The settings that a result names."""
    cfg, on_gpu = config(sizes.shape, **sizes.changed), torch.cuda.is_available()
    layers = f"S {cfg.num_self_decoder_layers}, C {cfg.num_cross_decoder_layers}, T {cfg.num_iterations}"
    heads = f"{cfg.num_attention_heads} query and {cfg.num_key_value_heads} KV heads of {cfg.head_dim}"
    width, parameters = f"width {cfg.hidden_size}", f"{stored_parameters(cfg) / 1e6:.1f}M parameters"
    return dict(
        shape=sizes.shape,
        sizes=f"{width}, {layers}, W {cfg.sliding_window}, {heads}, {parameters}",
        dtype=sizes.dtype,
        mode="compiled" if on_gpu else "eager",
        rounds=sizes.prompts,
        batches=sizes.batches,
        steps=STEPS * ROUNDS,
        budget_gib=sizes.budget_gib,
    )


def measure(sizes: Sizes, models: dict[str, tuple[PretrainedConfig, dict[str, Any]]] | None = None) -> Result:
    """Of the peers, or of other `models` as `peers` describes them."""
    longest, most = max(sizes.prompts) + MARGIN, max(sizes.batches)
    settings: dict[str, Any] = dict(dtype=sizes.dtype, max_model_len=longest, max_num_seqs=most)
    settings |= dict(enforce_eager=not torch.cuda.is_available())  # on a CPU five models would take too long to compile
    engines = {}
    for name, (cfg, more) in (models or peers(sizes)).items():
        progress(f"starting {name}")
        engines[name] = start(cfg, **settings | more)
    chunks = {name: core(llm).scheduler.max_num_scheduled_tokens for name, llm in engines.items()}
    groups = {name: len(core(llm).scheduler.kv_cache_config.kv_cache_groups) for name, llm in engines.items()}
    result = Result.here(sizes.table, **described(sizes), groups=groups, chunks=chunks)
    for tokens, taken in prefill(engines, sizes.prompts).items():
        for name, seconds in taken.items():
            result.add("first token", "s", seconds, tokens=tokens, model=name)
    for tokens in sizes.prompts:
        for batch in sizes.batches:
            for name, seconds in decode(engines, tokens, batch).items():
                result.add("decode step", "s", seconds, tokens=tokens, model=name, batch=batch)
        for name, llm in engines.items():
            held = held_in_decode(llm, tokens) * block_bytes(llm)
            result.add("KV cache", "MiB", held / 2**20, tokens=tokens, model=name)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="the paper's 1.3B shape in bfloat16, for a GPU")
    sizes = PAPER if parser.parse_args().paper else SMALL
    if sizes is PAPER and not (torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= PAPER_GPU_BYTES):
        sys.exit(f"--paper holds five models at once: it needs a GPU with {PAPER_GPU_BYTES >> 30} GiB free.")
    if sizes is PAPER:
        publish(measure(sizes))
    else:
        publish(in_each_dtype(lambda dtype: measure(dataclasses.replace(sizes, dtype=dtype))))


if __name__ == "__main__":
    main()
