"""YOCO-U beside what people would serve instead, in the same vLLM: Transformers, and looped models as vLLM has them.

Peers have the width, heads and feed-forward of YOCO-U. One Transformer has as many layers as YOCO-U has layer passes,
S·T + C, one as many as it stores, S + C. The looped ones are YOCO-U with a KV cache group for each cache, and vLLM's
IQuestLoopCoder, whose S + C layers run twice, the second time over a window. With --paper the shape is the paper's, on
a GPU.
"""

from benchmarks.engine import (
    LAYOUTS,
    block_bytes,
    config,
    core,
    decoding,
    print_table,
    prompt_s,
    start,
    steps_of_prompts,
)

import argparse  # isort: skip
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, PretrainedConfig
from vllm import LLM

from benchmarks.kv_layout import held_in_decode

CHUNK, BUDGET_BYTES = 1024, 1 << 30
OURS, LIKE_PAPER = "YOCO-U", "Transformer, S + C layers"
PICTURE = Path(__file__).parent / "pictures" / "peers.png"

# Of the paper's table (SPEC.md, section 5): YOCO-U over the Transformer of S + C layers, prefill, decode, KV bytes.
PAPER_RATIOS = {
    8 << 10: (75_637 / 85_707, None, 46 / 320),
    16 << 10: (75_694 / 66_342, 1_966 / 1_795, 62 / 640),
    64 << 10: (76_148 / 27_276, 865 / 450, 158 / 2_560),
    256 << 10: (76_301 / 7_475, 303 / 137, 542 / 10_240),
}


@dataclass(frozen=True)
class Sizes:
    """Prompt rounds by length in tokens, and requests of the decode steps; a pool takes `most_kv_bytes` at most."""

    shape: str
    dtype: str
    prompts: dict[int, int]
    batches: tuple[int, ...]
    most_kv_bytes: int
    changed: dict


SMALL = Sizes("77M", "float32", {1 << 10: 3, 4 << 10: 2, 16 << 10: 1}, (1, 8), 5 << 30, dict(num_key_value_heads=2))
PAPER = Sizes(
    "paper 1.3B",
    "bfloat16",
    {1 << 10: 5, 4 << 10: 5, 16 << 10: 3, 64 << 10: 3, 256 << 10: 1},
    (1, 8),
    16 << 30,
    {},
)
STEPS, ROUNDS = 8, 3


def peers(sizes: Sizes) -> dict[str, tuple[PretrainedConfig, dict]]:
    """Config and engine settings by name."""
    ours = config(sizes.shape, **sizes.changed)
    stored, passes = ours.num_hidden_layers, ours.num_iterations * ours.num_self_decoder_layers

    def llama(layers: int, architecture: str = "LlamaForCausalLM", **more) -> LlamaConfig:
        same = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim rms_norm_eps"
        kept = {key: getattr(ours, key) for key in (*same.split(), "max_position_embeddings")}
        return LlamaConfig(**kept, num_hidden_layers=layers, architectures=[architecture], **more)

    def pool(layers: int) -> dict:
        """Room for all requests of the longest context in this many layers' caches; some more than YOCO-U needs."""
        token_bytes = layers * 2 * ours.num_key_value_heads * ours.head_dim * getattr(torch, sizes.dtype).itemsize
        tokens = max(sizes.batches) * (max(sizes.prompts) + 4 * CHUNK)
        return dict(kv_cache_memory_bytes=min(sizes.most_kv_bytes, token_bytes * tokens))

    cross = ours.num_cross_decoder_layers
    naive = dict(additional_config={"yocou": LAYOUTS["naive"]})
    looped = llama(stored, "IQuestLoopCoderForCausalLM", loop_num=2, loop_window_size=ours.sliding_window)
    return {
        OURS: (ours, pool(passes // 4)),
        "Transformer, S·T + C layers": (llama(passes + cross), pool(passes + cross)),
        LIKE_PAPER: (llama(stored), pool(stored)),
        "YOCO-U, a group for each cache": (ours, pool(passes // 4) | naive),
        "IQuestLoopCoder, 2 · (S + C) passes": (looped, pool(stored)),
    }


def prefill(engines: dict[str, LLM], prompts: dict[int, int]) -> dict[int, dict[str, float]]:
    """Median seconds to the first token, by length and engine."""
    for llm in engines.values():
        prompt_s(llm, min(prompts))
    rounds = {
        tokens: [{name: prompt_s(llm, tokens) for name, llm in engines.items()} for _ in range(n)]
        for tokens, n in prompts.items()
    }
    return {
        tokens: {name: statistics.median(times[name] for times in taken) for name in engines}
        for tokens, taken in rounds.items()
    }


def decode(engines: dict[str, LLM], context: int, batch: int) -> dict[str, float]:
    """Median seconds of a step by engine; of those whose pool holds so many requests."""
    step_s: dict[str, list[float]] = {}
    with ExitStack() as stack:
        for name, llm in engines.items():
            pool = core(llm).scheduler.kv_cache_config.num_blocks
            longest = context + STEPS * ROUNDS + steps_of_prompts(llm, batch, context)
            if held_in_decode(llm, longest) * batch < pool:
                stack.enter_context(decoding(llm, batch, context, STEPS * ROUNDS + 8))
                step_s[name] = []
        for _ in range(ROUNDS):
            for name, times in step_s.items():
                for _ in range(STEPS):
                    start_s = time.perf_counter()
                    engines[name].llm_engine.step()
                    times.append(time.perf_counter() - start_s)
    return {name: statistics.median(times) for name, times in step_s.items()}


def ratio(ours: float | None, theirs: float | None, paper: float | None = None) -> str:
    if ours is None or theirs is None:
        return ""
    return f"{ours / theirs:.2f}x" + (f" (paper {paper:.2f}x)" if paper else "")


def table(names: list[str], sizes: Sizes, first_s: dict, step_s: dict, held_bytes: dict) -> list[list]:
    rows = []
    for tokens in sizes.prompts:
        paper = PAPER_RATIOS.get(tokens, (None, None, None))
        for name in names:
            prompt, kv = first_s[tokens][name], held_bytes[tokens][name]
            of_paper = paper if name == LIKE_PAPER else (None, None, None)
            cells = [f"{tokens / prompt:,.0f} ({prompt:.2f} s)", ratio(prompt, first_s[tokens][OURS], of_paper[0])]
            for batch in sizes.batches:
                steps = step_s[tokens, batch]
                cells.append(f"{batch / steps[name]:.1f}" if name in steps else "does not fit")
                cells.append(ratio(steps.get(name), steps.get(OURS), of_paper[1] if batch > 1 else None))
            ours = held_bytes[tokens][OURS]
            cells += [f"{kv / 2**20:.1f} MiB", ratio(ours, kv, of_paper[2]), BUDGET_BYTES // kv]
            rows.append([tokens, name, *cells])
    return rows


def draw(names: list[str], sizes: Sizes, first_s: dict, step_s: dict, held_bytes: dict, title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lengths, last = list(sizes.prompts), sizes.batches[-1]
    figure, (prompts, steps, bytes_) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name in names:
        bold = dict(label=name, marker="o", linewidth=2.5 if name == OURS else 1.2)
        prompts.plot(lengths, [tokens / first_s[tokens][name] for tokens in lengths], **bold)
        fitting = [tokens for tokens in lengths if name in step_s[tokens, last]]
        steps.plot(fitting, [last / step_s[tokens, last][name] for tokens in fitting], **bold)
        bytes_.plot(lengths, [held_bytes[tokens][name] / 2**20 for tokens in lengths], **bold)
    labels = ("prefill, tokens/s", f"decode, tokens/s, {last} requests", "KV cache, MiB a request")
    for axes, label in zip((prompts, steps, bytes_), labels, strict=True):
        axes.set(title=label, xlabel="tokens", xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{tokens >> 10}k" for tokens in lengths])
    bytes_.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="the paper's 1.3B shape in bfloat16, for a GPU")
    sizes = PAPER if parser.parse_args(arguments).paper else SMALL
    longest = max(sizes.prompts)
    settings = dict(dtype=sizes.dtype, max_model_len=longest + 4 * CHUNK, max_num_batched_tokens=CHUNK)
    settings |= dict(max_num_seqs=max(sizes.batches))
    on_gpu = torch.cuda.is_available()
    # All engines share a device; on a CPU nobody waits for five models to compile.
    settings |= dict(gpu_memory_utilization=0.15) if on_gpu else dict(enforce_eager=True)
    engines = {name: start(cfg, **settings | more) for name, (cfg, more) in peers(sizes).items()}
    first_s = prefill(engines, sizes.prompts)
    step_s = {(tokens, batch): decode(engines, tokens, batch) for tokens in sizes.prompts for batch in sizes.batches}
    held_bytes = {
        tokens: {name: held_in_decode(llm, tokens) * block_bytes(llm) for name, llm in engines.items()}
        for tokens in sizes.prompts
    }
    names, cfg = list(engines), peers(sizes)[OURS][0]
    groups = {name: len(core(llm).scheduler.kv_cache_config.kv_cache_groups) for name, llm in engines.items()}
    note = (
        f"{sizes.shape} shape: width {cfg.hidden_size}, S {cfg.num_self_decoder_layers}, "
        f"C {cfg.num_cross_decoder_layers}, T {cfg.num_iterations}, W {cfg.sliding_window}, {cfg.num_attention_heads} "
        f"query and {cfg.num_key_value_heads} KV heads of {cfg.head_dim}; random weights, {sizes.dtype}, "
        f"{'compiled' if on_gpu else 'eager'}, chunks of {CHUNK}; medians of "
        f"{'/'.join(map(str, sizes.prompts.values()))} prompts and {STEPS * ROUNDS} steps, in turn. The paper's ratios "
        "are of its 1.3B shape in bfloat16, batch 32, on an H100. KV cache groups: "
        f"{', '.join(f'{name} {n}' for name, n in groups.items())}."
    )
    header = ["tokens", "model", "prefill tokens/s (time to first token)", "YOCO-U / this"]
    for batch in sizes.batches:
        header += [f"decode tokens/s, batch {batch}", "YOCO-U / this"]
    header += ["KV a request", "YOCO-U / this", "requests in 1 GiB"]
    measured = (names, sizes, first_s, step_s, held_bytes)
    print_table("YOCO-U and its peers", note, header, table(*measured))
    device = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"
    draw(*measured, title=f"{sizes.shape} shape, {sizes.dtype}, {device}")


if __name__ == "__main__":
    main()
