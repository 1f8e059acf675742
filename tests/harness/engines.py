"""Engines in this process, where scheduler and runner can be looked at."""

import gc

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

CHUNK = 37
CONTEXT = 1024


def start(folder, **settings) -> LLM:
    defaults = dict(
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=8,
        disable_log_stats=False,
        compilation_config={"mode": 0},  # test_compilation.py has compiled ones
    )
    return LLM(str(folder), **defaults | settings)


def stop(llm: LLM) -> None:
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def generate(llm: LLM, prompts: list[list[int]], tokens: int = 12, **sampling):
    settings = dict(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=5, detokenize=False)
    parameters = SamplingParams(**settings | sampling)
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)


def metric(llm: LLM, name: str) -> float:
    return sum(found.value for found in llm.get_metrics() if found.name == name)
