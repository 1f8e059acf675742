"""The served model beside transformers' generate() of the reference model: the same shape, prompts and thread count."""

from benchmarks.engine import config, print_table, start

import statistics  # isort: skip
import time
from collections.abc import Callable

import torch
from vllm import LLM, SamplingParams

from vllm_yocou.reference import YocoUForCausalLM

SHAPE = "77M"
PROMPTS, BATCHES = (512, 2048), (1, 8)
NEW, ROUNDS = 33, 3


def by_reference(model: YocoUForCausalLM, prompts_BN: torch.Tensor, new: int) -> None:
    settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
    model.generate(prompts_BN, attention_mask=torch.ones_like(prompts_BN), **settings)


def by_vllm(llm: LLM, prompts_BN: torch.Tensor, new: int) -> None:
    parameters = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts_BN.tolist()], parameters, use_tqdm=False)


def seconds(generate: Callable[[int], None]) -> tuple[float, float]:
    """To the first token of all requests, and of each further one."""
    start_s = time.perf_counter()
    generate(1)
    first_s = time.perf_counter() - start_s
    generate(NEW)
    return first_s, (time.perf_counter() - start_s - 2 * first_s) / (NEW - 1)


def main() -> None:
    cfg = config(SHAPE, max_position_embeddings=1 << 14)
    model = YocoUForCausalLM(cfg).eval()
    model.generation_config.pad_token_id = 0
    llm = start(cfg, max_model_len=4096, max_num_seqs=max(BATCHES), kv_cache_memory_bytes=2 << 30, enforce_eager=True)
    rows = []
    for tokens in PROMPTS:
        for batch in BATCHES:
            prompts_BN = torch.randint(1, cfg.vocab_size, (batch, tokens))
            ways = {
                "generate()": lambda new, prompts=prompts_BN: by_reference(model, prompts, new),
                "vLLM": lambda new, prompts=prompts_BN: by_vllm(llm, prompts, new),
            }
            times = {way: [] for way in ways}
            for _ in range(ROUNDS):
                for way, generate in ways.items():
                    times[way].append(seconds(generate))
            medians = {
                way: [statistics.median(part) for part in zip(*taken, strict=True)] for way, taken in times.items()
            }
            (their_first, their_next), (our_first, our_next) = medians["generate()"], medians["vLLM"]
            cells = [f"{their_first:.2f} s", f"{our_first:.2f} s", f"{their_first / our_first:.2f}x"]
            cells += [f"{batch / s:.1f}" for s in (their_next, our_next)] + [f"{their_next / our_next:.2f}x"]
            rows.append([tokens, batch, *cells])
    header = ["prompt", "batch", "first token, generate()", "vLLM", "generate() / vLLM"]
    header += ["decode tokens/s, generate()", "vLLM", "vLLM / generate()"]
    note = (
        f"{SHAPE} shape, random weights, float32, {torch.get_num_threads()} threads each, vLLM eager; medians of "
        f"{ROUNDS} rounds in turn, decode over {NEW - 1} tokens."
    )
    print_table("vLLM and the reference model", note, header, rows)


if __name__ == "__main__":
    main()
