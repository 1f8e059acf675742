"""YOCO-U beside what people would serve instead, in the same vLLM: Transformers, and looped models as vLLM has them.

Peers have the width, heads and feed-forward of YOCO-U. One Transformer has as many layers as YOCO-U has layer passes,
S·T + C, one as many as it stores, S + C. The looped ones are YOCO-U with a KV cache group for each cache, and vLLM's
IQuestLoopCoder, whose S + C layers run twice, the second time over a window. All have vLLM's default chunks, so that
YOCO-U's chunks are the plugin's and the others' are vLLM's. With --paper the shape is the paper's, on a GPU.
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

import argparse  # isort: skip
import os
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, PretrainedConfig
from vllm import LLM

from benchmarks.kv_layout import held_in_decode
from benchmarks.table import print_table
from vllm_yocou.cli.kv_bytes import KVBytes
from vllm_yocou.cli.parameters import stored

MARGIN = 4096  # tokens that a request has room for beyond its prompt, or in flight in a window cache
OURS, LIKE_PAPER, LOOPED = "YOCO-U", "Transformer, S + C layers", "IQuestLoopCoder, 2 · (S + C) passes"
PICTURES = Path(__file__).parent / "pictures"

# Of the paper's table (SPEC.md, section 5): prefill, decode and KV bytes of YOCO-U over a Transformer of S + C layers,
# and over its looped model, RINS.
PAPER_RATIOS = {
    LIKE_PAPER: {
        8 << 10: (75_637 / 85_707, None, 46 / 320),
        16 << 10: (75_694 / 66_342, 1_966 / 1_795, 62 / 640),
        64 << 10: (76_148 / 27_276, 865 / 450, 158 / 2_560),
        256 << 10: (76_301 / 7_475, 303 / 137, 542 / 10_240),
    },
    LOOPED: {
        16 << 10: (75_694 / 33_276, 1_966 / 580, None),
        64 << 10: (76_148 / 13_630, 865 / 118, None),
        256 << 10: (76_301 / 3_739, 303 / 56, None),
    },
}


@dataclass(frozen=True)
class Sizes:
    """Prompt rounds by length in tokens, requests of the decode steps, and how much a pool has to hold.

    All requests of the largest batch fit at `together` tokens, one of them at the longest length.
    """

    shape: str
    dtype: str
    prompts: dict[int, int]
    batches: tuple[int, ...]
    together: int
    budget_bytes: int
    picture: str
    changed: dict


SMALL = Sizes(
    "57M",
    "float32",
    {1 << 10: 5, 4 << 10: 3, 16 << 10: 3},
    (1, 8),
    16 << 10,
    1 << 30,
    "peers.png",
    dict(num_key_value_heads=2),
)
PAPER = Sizes(
    "paper 1.3B",
    "bfloat16",
    {1 << 10: 5, 4 << 10: 5, 8 << 10: 5, 16 << 10: 3, 64 << 10: 3, 256 << 10: 1},
    (1, 8),
    64 << 10,
    80 << 30,
    "peers_paper.png",
    {},
)
PAPER_GPU_BYTES = 125 << 30
STEPS, ROUNDS = 8, 3


def peers(sizes: Sizes) -> dict[str, tuple[PretrainedConfig, dict]]:
    """Config and engine settings by name."""
    ours = config(sizes.shape, **sizes.changed)
    layers, passes = ours.num_hidden_layers, ours.num_iterations * ours.num_self_decoder_layers

    def llama(layers: int, architecture: str = "LlamaForCausalLM", **more) -> LlamaConfig:
        same = "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim rms_norm_eps"
        kept = {key: getattr(ours, key) for key in (*same.split(), "max_position_embeddings")}
        return LlamaConfig(**kept, num_hidden_layers=layers, architectures=[architecture], **more)

    batch, longest = max(sizes.batches), max(sizes.prompts) + MARGIN
    element_bytes = getattr(torch, sizes.dtype).itemsize

    def pool(layers: int, share: float = 1.0) -> dict:
        """Room in the caches of so many layers, each of all tokens."""
        token_bytes = KVBytes.transformer(ours, element_bytes).token // ours.num_hidden_layers * layers
        return dict(kv_cache_memory_bytes=int(share * token_bytes * max(longest, batch * (sizes.together + MARGIN))))

    kv = KVBytes.yoco_u(ours, element_bytes)
    in_flight = kv.window_token * (ours.sliding_window + MARGIN)
    room = dict(kv_cache_memory_bytes=batch * (kv.token * longest + in_flight))
    cross = ours.num_cross_decoder_layers
    naive = dict(additional_config={"yocou": LAYOUTS["naive"]})
    looped = llama(layers, "IQuestLoopCoderForCausalLM", loop_num=2, loop_window_size=ours.sliding_window)
    return {
        OURS: (ours, room),
        "Transformer, S·T + C layers": (llama(passes + cross), pool(passes + cross)),
        LIKE_PAPER: (llama(layers), pool(layers)),
        "YOCO-U, a group for each cache": (ours, room | naive),
        LOOPED: (looped, pool(layers, 1.25)),
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
    return {name: statistics.median(times) for name, times in taken.items()}


def ratio(ours: float | None, theirs: float | None, paper: float | None = None) -> str:
    here = "" if ours is None or theirs is None else f"{ours / theirs:.2f}x"
    return f"{here} (paper {paper:.2f}x)".strip() if paper else here


def table(names: list[str], sizes: Sizes, first_s: dict, next_s: dict, held_bytes: dict) -> list[list]:
    rows = []
    for tokens in sizes.prompts:
        for name in names:
            prompt, kv = first_s[tokens][name], held_bytes[tokens][name]
            of_paper = PAPER_RATIOS.get(name, {}).get(tokens, (None, None, None))
            cells = [f"{tokens / prompt:,.0f} ({prompt:.2f} s)", ratio(prompt, first_s[tokens][OURS], of_paper[0])]
            for batch in sizes.batches:
                steps = next_s[tokens, batch]
                cells.append(f"{batch / steps[name]:.1f}" if name in steps else "does not fit")
                cells.append(ratio(steps.get(name), steps.get(OURS), of_paper[1] if batch > 1 else None))
            ours = held_bytes[tokens][OURS]
            cells += [f"{kv / 2**20:.1f} MiB", ratio(ours, kv, of_paper[2]), sizes.budget_bytes // kv]
            rows.append([tokens, name, *cells])
    return rows


def draw(names: list[str], sizes: Sizes, first_s: dict, next_s: dict, held_bytes: dict, title: str) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lengths, last = list(sizes.prompts), sizes.batches[-1]
    figure, (prompts, steps, bytes_) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name in names:
        bold = dict(label=name, marker="o", linewidth=2.5 if name == OURS else 1.2)
        prompts.plot(lengths, [tokens / first_s[tokens][name] for tokens in lengths], **bold)
        fitting = [tokens for tokens in lengths if name in next_s[tokens, last]]
        steps.plot(fitting, [last / next_s[tokens, last][name] for tokens in fitting], **bold)
        bytes_.plot(lengths, [held_bytes[tokens][name] / 2**20 for tokens in lengths], **bold)
    labels = ("prefill, tokens/s", f"decode, tokens/s, {last} requests", "KV cache, MiB a request")
    for axes, label in zip((prompts, steps, bytes_), labels, strict=True):
        axes.set(title=label, xlabel="tokens", xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{tokens >> 10}k" for tokens in lengths])
    bytes_.legend(fontsize="small")
    figure.suptitle(title, fontsize="small")
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / sizes.picture, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="the paper's 1.3B shape in bfloat16, for a GPU")
    sizes = PAPER if parser.parse_args(arguments).paper else SMALL
    if sizes is PAPER and not (torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= PAPER_GPU_BYTES):
        parser.error(f"--paper holds five models at once: it needs a GPU with {PAPER_GPU_BYTES >> 30} GiB free.")
    longest, most = max(sizes.prompts) + MARGIN, max(sizes.batches)
    settings = dict(dtype=sizes.dtype, max_model_len=longest, max_num_seqs=most)
    on_gpu = torch.cuda.is_available()
    settings |= dict(enforce_eager=not on_gpu)  # on a CPU nobody waits for five models to compile
    engines = {name: start(cfg, **settings | more) for name, (cfg, more) in peers(sizes).items()}
    first_s = prefill(engines, sizes.prompts)
    next_s = {(tokens, batch): decode(engines, tokens, batch) for tokens in sizes.prompts for batch in sizes.batches}
    held_bytes = {
        tokens: {name: held_in_decode(llm, tokens) * block_bytes(llm) for name, llm in engines.items()}
        for tokens in sizes.prompts
    }
    names, cfg = list(engines), peers(sizes)[OURS][0]
    chunks = {name: core(llm).scheduler.max_num_scheduled_tokens for name, llm in engines.items()}
    groups = {name: len(core(llm).scheduler.kv_cache_config.kv_cache_groups) for name, llm in engines.items()}
    note = (
        f"{sizes.shape} shape: width {cfg.hidden_size}, S {cfg.num_self_decoder_layers}, "
        f"C {cfg.num_cross_decoder_layers}, T {cfg.num_iterations}, W {cfg.sliding_window}, {cfg.num_attention_heads} "
        f"query and {cfg.num_key_value_heads} KV heads of {cfg.head_dim}, {stored(cfg) / 1e6:.1f}M parameters; "
        f"random weights, {sizes.dtype}, "
        f"{'compiled' if on_gpu else 'eager'}; medians of "
        f"{'/'.join(map(str, sizes.prompts.values()))} prompts and {STEPS * ROUNDS} steps, in turn. The paper's ratios "
        "are of its 1.3B shape in bfloat16, batch 32, on an H100, that of a looped model over RINS. KV cache groups: "
        f"{', '.join(f'{name} {n}' for name, n in groups.items())}. Tokens of a step: "
        f"{', '.join(f'{name} {n}' for name, n in chunks.items())}."
    )
    header = ["tokens", "model", "prefill tokens/s (time to first token)", "YOCO-U / this"]
    for batch in sizes.batches:
        header += [f"decode tokens/s, batch {batch}", "YOCO-U / this"]
    header += ["KV a request", "YOCO-U / this", f"requests in {sizes.budget_bytes >> 30} GiB"]
    measured = (names, sizes, first_s, next_s, held_bytes)
    print_table("YOCO-U and its peers", note, header, table(*measured))
    device = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"
    draw(*measured, title=f"{sizes.shape} shape, {sizes.dtype}, {device}")


if __name__ == "__main__":
    main()
