"""Engines in this process, where scheduler and runner can be looked at; each ends with what asked for it."""

import gc
import pkgutil
import traceback
from functools import cache
from pathlib import Path
from typing import Any

CHUNK = 37
CONTEXT = 1024
DEFAULTS = dict(
    skip_tokenizer_init=True,
    dtype="float32",
    max_model_len=CONTEXT,
    max_num_batched_tokens=CHUNK,
    max_num_seqs=8,
    kv_cache_memory_bytes=64 << 20,
    disable_log_stats=False,
    compilation_config={"mode": 0},  # test_compilation.py has compiled ones
)


def know_the_model_class() -> None:
    """vLLM would ask a process what the plugin's model can do, by importing itself once more: ten seconds of a core."""
    from vllm.model_executor.models.registry import ModelRegistry

    from vllm_yocou.registration import ARCHITECTURE, MODEL_CLASS

    ModelRegistry.register_model(ARCHITECTURE, pkgutil.resolve_name(MODEL_CLASS))


@cache
def override_kernels_once() -> None:
    """Keep the C++ functions that vLLM puts in the place of Triton's kernels for the life of the process.

    It sets them again for every engine, which fails in vLLM 0.32 after an engine with n-gram drafts: numba's modules
    are not what its search expects.
    """
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.register_triton_kernel_overrides = staticmethod(cache(CpuPlatform.register_triton_kernel_overrides))


class Engines:
    """Starts vLLM engines by being called; `stop` leaves nothing of them that the next engine could meet.

    Without it, the frames of a failed test keep an engine alive, which takes the parallel groups of a later one with it
    when it is collected, and a start that failed leaves groups of its own.
    """

    def __init__(self) -> None:
        self.started: list = []

    def __call__(self, folder: Path | str, **settings: Any):
        """A `vllm.LLM` over the checkpoint in `folder`; `settings` are those of `LLM`, over DEFAULTS."""
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        override_kernels_once()
        try:
            self.started.append(LLM(str(folder), **DEFAULTS | settings))
        except BaseException as error:
            # The frames of a failed start hold half an engine, which would end the groups of a later one as well.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
            if not self.started:
                cleanup_dist_env_and_memory()
            raise
        return self.started[-1]

    def stop(self) -> None:
        """End all engines that were started, whoever still holds one."""
        while self.started:
            # It destroys the groups and collects garbage, which is not cheap; the engine itself may be collected later,
            # since nothing is left for it to do then.
            self.started.pop().llm_engine.engine_core.shutdown()


def generate(llm, prompts: list[list[int] | dict], tokens: int = 12, **sampling: Any) -> list:
    """Greedy completions of `tokens` tokens each, with the five best log probabilities; `sampling` comes on top.

    Prompts are token ids, or what else vLLM takes.
    """
    from vllm import SamplingParams

    settings = dict(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=5, detokenize=False)
    parameters = SamplingParams(**settings | sampling)
    inputs = [prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, parameters, use_tqdm=False)


def metric(llm, name: str) -> float:
    """The sum over all engines that this process has had."""
    return sum(found.value for found in llm.get_metrics() if found.name == name)


def kv_cache_config(llm):
    """What vLLM's scheduler has decided: the groups of caches and the number of blocks."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config


def model_runner(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner
