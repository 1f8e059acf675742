"""The served model compared with transformers' generate() of the reference model: same shape, prompts, thread count."""

from benchmarks.engine import config, decoding, start, step_s

import statistics
import sys
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import StoppingCriteria
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from benchmarks.console import progress, publish
from benchmarks.precision import in_each_dtype
from benchmarks.results import Result
from vllm_yocou.reference import YocoUForCausalLM

SHAPE = "57M"
PROMPTS, BATCHES = (512, 2048), (1, 8)
STEPS, ROUNDS = 32, 3


class Clock(StoppingCriteria):
    """Notes the time of each new token of generate() and never stops it."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.at_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def by_reference(model: YocoUForCausalLM, prompts_BN: torch.Tensor) -> tuple[float, float]:
    """Seconds to the first token of all prompts, and the median of the further steps."""
    clock, new = Clock(), STEPS + 1
    settings: dict[str, Any] = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, stopping_criteria=[clock])
    start_s = time.perf_counter()
    model.generate(  # type: ignore[misc]  # transformers' own type of it takes the model twice
        prompts_BN, attention_mask=torch.ones_like(prompts_BN), **settings
    )
    return clock.at_s[0] - start_s, statistics.median(b - a for a, b in pairwise(clock.at_s))


def by_vllm(llm: LLM, prompts_BN: torch.Tensor) -> tuple[float, float]:
    """The same by vLLM; all requests are in decode when its steps are timed."""
    parameters = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    start_s = time.perf_counter()
    llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts_BN.tolist()], parameters, use_tqdm=False)
    first_s = time.perf_counter() - start_s
    with decoding(llm, batch=len(prompts_BN), context=prompts_BN.shape[1], room=STEPS + 8):
        return first_s, statistics.median(step_s(llm) for _ in range(STEPS))


def measure(dtype: str = "float32") -> Result:
    if torch.cuda.is_available():
        sys.exit("reference_model compares on a CPU, and vLLM would take the GPU: run it on a machine without one.")
    cfg = config(SHAPE, max_position_embeddings=1 << 14)
    model = YocoUForCausalLM(cfg).to(getattr(torch, dtype)).eval()
    model.generation_config.pad_token_id = 0
    settings: dict[str, Any] = dict(dtype=dtype, max_model_len=4096, max_num_seqs=max(BATCHES), enforce_eager=True)
    llm = start(cfg, kv_cache_memory_bytes=2 << 30, **settings)
    sizes = dict(shape=SHAPE, kv_heads=cfg.num_key_value_heads, dtype=dtype, threads=torch.get_num_threads())
    result = Result.here("reference_model", **sizes, rounds=ROUNDS, steps=STEPS)
    for tokens in PROMPTS:
        for batch in BATCHES:
            prompts_BN = torch.randint(1, cfg.vocab_size, (batch, tokens))
            times: dict[str, list[tuple[float, float]]] = {"generate()": [], "vLLM": []}
            for number in range(ROUNDS + 1):
                progress(f"prompts of {tokens}, batch {batch}, round {number + 1} of {ROUNDS + 1}")
                times["generate()"].append(by_reference(model, prompts_BN))
                times["vLLM"].append(by_vllm(llm, prompts_BN))
            for way, (_, *taken) in times.items():  # the first round warms up
                first_s, next_s = zip(*taken, strict=True)
                result.add("first token", "s", first_s, prompt=tokens, batch=batch, way=way)
                result.add("decode step", "s", next_s, prompt=tokens, batch=batch, way=way)
    return result


if __name__ == "__main__":
    publish(in_each_dtype(measure))
