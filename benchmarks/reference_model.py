"""The served model beside transformers' generate() of the reference model: the same shape, prompts and thread count."""

from benchmarks.engine import config, decoding, print_table, start

import statistics  # isort: skip
import time

import torch
from vllm import LLM, SamplingParams

from vllm_yocou.reference import YocoUForCausalLM

SHAPE = "77M"
PROMPTS, BATCHES = (512, 2048), (1, 8)
STEPS, ROUNDS = 32, 3


def by_reference(model: YocoUForCausalLM, prompts_BN: torch.Tensor) -> tuple[float, float]:
    """Seconds to the first token of all prompts, and of each further step."""
    times = []
    for new in (1, STEPS + 1):
        start_s = time.perf_counter()
        settings = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
        model.generate(prompts_BN, attention_mask=torch.ones_like(prompts_BN), **settings)
        times.append(time.perf_counter() - start_s)
    return times[0], (times[1] - times[0]) / STEPS


def by_vllm(llm: LLM, prompts_BN: torch.Tensor) -> tuple[float, float]:
    """The same; steps are of requests that are all in decode."""
    parameters = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    start_s = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts_BN.tolist()], parameters, use_tqdm=False)
    first_s = time.perf_counter() - start_s
    with decoding(llm, *prompts_BN.shape, room=STEPS + 8):
        start_s = time.perf_counter()
        for _ in range(STEPS):
            llm.llm_engine.step()
        return first_s, (time.perf_counter() - start_s) / STEPS


def main() -> None:
    cfg = config(SHAPE, max_position_embeddings=1 << 14)
    model = YocoUForCausalLM(cfg).eval()
    model.generation_config.pad_token_id = 0
    llm = start(cfg, max_model_len=4096, max_num_seqs=max(BATCHES), kv_cache_memory_bytes=2 << 30, enforce_eager=True)
    rows = []
    for tokens in PROMPTS:
        for batch in BATCHES:
            prompts_BN = torch.randint(1, cfg.vocab_size, (batch, tokens))
            times = {"generate()": [], "vLLM": []}
            for _ in range(ROUNDS):
                times["generate()"].append(by_reference(model, prompts_BN))
                times["vLLM"].append(by_vllm(llm, prompts_BN))
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
        f"{ROUNDS} rounds in turn, decode over {STEPS} steps."
    )
    print_table("vLLM and the reference model", note, header, rows)


if __name__ == "__main__":
    main()
