"""How many tokens a step takes: a window cache holds every token in flight, so vLLM's default is lowered.

vLLM has filled in its default before the plugin is asked, and does not say so.
"""

import logging
from typing import TYPE_CHECKING

from vllm_yocou.options import Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.plugins.yocou")


def choose_chunk(vllm_config: "VllmConfig") -> None:
    """Lower vLLM's default of `max_num_batched_tokens`; a user's own value stays, unless it is that default.

    A value counts as vLLM's default if it is what vLLM would have chosen. That is announced, together with the option
    that keeps it.
    """
    scheduler = vllm_config.scheduler_config
    decoded = scheduler.max_num_seqs * (1 + vllm_config.num_speculative_tokens)
    chosen, lowered = scheduler.max_num_batched_tokens, longest_chunk(decoded)
    keep = not Options.of(vllm_config.additional_config).lower_chunk
    if keep or not scheduler.enable_chunked_prefill or chosen <= lowered or chosen not in _default_chunks(vllm_config):
        return
    scheduler.max_num_batched_tokens = lowered
    logger.info(
        "max_num_batched_tokens is %d for YOCO-U instead of vLLM's default %d: its window caches hold every token in "
        "flight. Other values are kept; so is this one with vllm-yocou's option lower_chunk set to false.",
        lowered,
        chosen,
    )


def longest_chunk(decoded: int) -> int:
    """Tokens a step that are enough for the device, and have room for `decoded` ones with their drafts.

    On a GPU half of a chunk is left to prompts.
    """
    from vllm.platforms import current_platform

    from vllm_yocou.serving.capacity import CHUNK_ON_CPU, CHUNK_ON_GPU  # what registers the plugin needs neither

    return max(CHUNK_ON_CPU, decoded) if current_platform.is_cpu() else max(CHUNK_ON_GPU, 2 * decoded)


def _default_chunks(vllm_config: "VllmConfig") -> set[int]:
    """What vLLM makes of an unset `max_num_batched_tokens`, offline and online."""
    from vllm.config import SchedulerConfig
    from vllm.engine.arg_utils import EngineArgs

    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    by_usage, _ = EngineArgs.get_batch_defaults(parallel.pipeline_parallel_size * parallel.tensor_parallel_size)
    factor = 2 if vllm_config.performance_mode == "throughput" else 1
    longest = scheduler.max_num_seqs * vllm_config.model_config.max_model_len
    defaults = {*by_usage.values(), SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS}
    return {min(factor * default, longest) for default in defaults}
