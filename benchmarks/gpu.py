"""Prompts and decode steps of the paper's shape on a GPU: YOCO-U by tokens a step, and a Transformer of S + C layers.

`prefill` takes one prompt after the other, with row skipping and with every row. `decode` takes steps of requests whose
contexts are scheduled and not computed. Models have random weights in bfloat16. They run one at a time, compiled and in
CUDA graphs, as vLLM does by default.
"""

from benchmarks.engine import core, decoding, prompt_s, runner, start, step_s, steps_of_prompts, stop

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig
from vllm import LLM

from benchmarks.console import progress, publish
from benchmarks.kv_layout import held_in_decode
from benchmarks.peers import MARGIN, Sizes, described, peers
from benchmarks.results import Result
from benchmarks.tables.comparisons import LIKE_PAPER, OURS
from benchmarks.tables.gpu import EVERY_ROW, KERNELS, SKIPPING, in_chunks

K = 1 << 10
PROMPTS = {4 * K: 7, 16 * K: 5, 64 * K: 3}  # rounds by length in tokens
LONG = {256 * K: 1}
CONTEXTS = (1 * K, 16 * K, 64 * K)
BATCHES = (1, 32)
STEPS = 48
CHUNKS = {"prefill": (1 * K, 8 * K, 16 * K), "decode": (1 * K, 8 * K)}
SHAPE, DTYPE = "paper 1.3B", "bfloat16"
Model = tuple[PretrainedConfig, dict[str, Any]]


def sizes_of(what: str, prompts: dict[int, int]) -> Sizes:
    """Pools hold all requests at the shorter contexts, and those of YOCO-U at the longest too."""
    return Sizes(f"gpu_{what}", SHAPE, DTYPE, prompts, BATCHES, sorted(CONTEXTS)[-2], 0, {})


def models(what: str, sizes: Sizes) -> dict[str, Model]:
    """Config and engine settings by name. vLLM's own choice of tokens a step is the Transformer's alone."""
    those = peers(sizes)
    ours, room = those[OURS]

    def chunked(tokens: int, **options: bool) -> Model:
        additional = {"yocou": {"lower_chunk": False} | options}
        return ours, room | dict(max_num_batched_tokens=tokens, additional_config=additional)

    found = {in_chunks(tokens): chunked(tokens) for tokens in CHUNKS[what]}
    return found | {KERNELS: chunked(CHUNKS[what][0], kernels=True), LIKE_PAPER: those[LIKE_PAPER]}


@contextmanager
def every_row(llm: LLM) -> Iterator[None]:
    """No row skips the cross-decoder of a YOCO-U engine; another model has none to skip."""
    builders = [group.get_metadata_builder() for groups in runner(llm).attn_groups for group in groups]
    selectors = [builder.selector for builder in builders if hasattr(builder, "selector")]
    for selector in selectors:
        selector.may_skip = False
    try:
        yield
    finally:
        for selector in selectors:
            selector.may_skip = True


def prefill(llm: LLM, name: str, sizes: Sizes, result: Result) -> None:
    prompt_s(llm, min(sizes.prompts))
    for tokens, rounds in sizes.prompts.items():
        ways = (EVERY_ROW,) if name == LIKE_PAPER else (EVERY_ROW, SKIPPING)
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            progress(f"{name}: {tokens} tokens, round {number + 1} of {rounds}")
            with every_row(llm):
                times[EVERY_ROW].append(prompt_s(llm, tokens))
            if SKIPPING in times:
                times[SKIPPING].append(prompt_s(llm, tokens))
        for way, runs in times.items():
            result.add("first token", "s", runs, tokens=tokens, model=name, way=way)


def decode(llm: LLM, name: str, sizes: Sizes, result: Result) -> None:
    pool = core(llm).scheduler.kv_cache_config.num_blocks
    for batch in sizes.batches:
        for tokens in sizes.prompts:
            longest = tokens + STEPS + steps_of_prompts(llm, batch, tokens)
            if held_in_decode(llm, longest) * batch >= pool:
                continue
            progress(f"{name}: decode, {batch} requests of {tokens} tokens")
            with decoding(llm, batch, tokens, STEPS + 8):
                runs = [step_s(llm) for _ in range(STEPS)]
            result.add("decode step", "s", runs, batch=batch, tokens=tokens, model=name)


def measure(what: str, prompts: dict[int, int], **settings: Any) -> Result:
    """`what` is "prefill" or "decode"; `settings` apply to every engine, in addition to the table's own."""
    sizes = sizes_of(what, prompts)
    common: dict[str, Any] = dict(dtype=DTYPE, max_model_len=max(prompts) + MARGIN, max_num_seqs=max(BATCHES))
    named = described(sizes) | dict(chunks={}, steps=STEPS)
    del named["budget_gib"]
    result = Result.here(sizes.table, **named)

    def measure_one(name: str, cfg: PretrainedConfig, more: dict[str, Any]) -> None:
        progress(f"starting {name}")
        llm = start(cfg, **common | more | settings)
        result.settings["chunks"][name] = core(llm).scheduler.max_num_scheduled_tokens
        (prefill if what == "prefill" else decode)(llm, name, sizes, result)
        stop(llm)

    for name, (cfg, more) in models(what, sizes).items():
        measure_one(name, cfg, more)
        gc.collect()  # nothing refers to the engine any more, and the next one needs its memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prefill", "decode"))
    parser.add_argument("--long", action="store_true", help="prefill: one prompt of 262,144 tokens too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, f"gpu_{arguments.what} needs a GPU, and torch finds none on this machine.\n")
    prompts = PROMPTS | (LONG if arguments.long else {}) if arguments.what == "prefill" else dict.fromkeys(CONTEXTS, 1)
    publish(measure(arguments.what, prompts))


if __name__ == "__main__":
    main()
