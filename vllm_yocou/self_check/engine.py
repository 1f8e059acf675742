"""vLLM's engine of one model in this process: what is in force in it, and what it answers.

`VLLM_ENABLE_V1_MULTIPROCESSING` must be 0 before vLLM is imported. With tensor parallelism vLLM starts workers of its
own.
"""

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.entrypoints.llm import LLM
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams

from vllm_yocou.rows.selection import why_all_rows
from vllm_yocou.self_check import workload
from vllm_yocou.self_check.comparison import Answer
from vllm_yocou.self_check.models import Model, element_bytes
from vllm_yocou.self_check.workload import Case, Happened, Request
from vllm_yocou.serving.packing import SMALLEST_BLOCK, Packing

SKIPPED = "vllm:yocou_skipped_rows"
PREEMPTIONS = "vllm:num_preemptions"
LIKELIEST = 5
GREEDY: dict[str, Any] = dict(temperature=0, ignore_eos=True, logprobs=LIKELIEST, detokenize=False)


@dataclass(frozen=True)
class Settings:
    """The user's, by vLLM's names."""

    dtype: str = "auto"
    attention_backend: str | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    compilation_config: dict[str, Any] = field(default_factory=dict)
    additional_config: dict[str, Any] = field(default_factory=dict)


@contextmanager
def serving(model: Model, settings: Settings) -> Iterator["Engine"]:
    """The engine of a model, which leaves nothing behind that the next one could meet."""
    llm = None
    try:
        llm = LLM(model.folder, **engine_arguments(model, settings))
        yield Engine(llm)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # they hold half an engine
        raise
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def engine_arguments(model: Model, settings: Settings) -> dict[str, Any]:
    """What LLM takes: a pool of KV blocks that the workload overfills, and prompts in chunks."""
    device, ranks = current_platform.device_type, settings.tensor_parallel_size
    width, block = element_bytes(model.config, settings.dtype, device), SMALLEST_BLOCK.get(device, 16)
    packing = Packing.expected(model.config, width, ranks, block)
    blocks = workload.pool_blocks(packing, model.config, model.context)
    arguments: dict[str, Any] = dict(
        skip_tokenizer_init=True,
        dtype=settings.dtype,
        max_model_len=model.context,
        max_num_batched_tokens=workload.CHUNK,
        max_num_seqs=workload.SEQUENCES,
        enable_prefix_caching=True,
        num_gpu_blocks_override=blocks,
        kv_cache_memory_bytes=2 * blocks * packing.block_bytes,
        disable_log_stats=False,
        use_tqdm_on_load=False,
        tensor_parallel_size=ranks,
        enforce_eager=settings.enforce_eager,
        additional_config=settings.additional_config,
    )
    if settings.compilation_config:
        arguments["compilation_config"] = settings.compilation_config
    if settings.attention_backend is not None:
        arguments["attention_backend"] = settings.attention_backend
    return arguments


class Engine:
    """A running engine."""

    def __init__(self, llm: LLM):
        self.llm = llm
        self.config = llm.llm_engine.vllm_config
        self.in_worker: dict[str, Any] = llm.collective_rpc(in_force)[0]
        self.all_rows = why_all_rows(self.config)

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.config.model_config.dtype
        assert isinstance(dtype, torch.dtype)  # vLLM has resolved its name
        return dtype

    @property
    def pool(self) -> tuple[int, int, int]:
        """Tokens of a block of the one cache that keeps every token, window groups, and blocks in all."""
        groups = self.in_worker["kv_groups"]
        global_block = next(group["block"] for group in groups if group["window"] is None)
        return global_block, len(groups) - 1, self.in_worker["kv_blocks"]

    def facts(self) -> dict[str, Any]:
        """What is in force, as JSON can hold it."""
        return {
            "runner": "V2" if self.config.use_v2_model_runner else "V1",
            "dtype": str(self.dtype).removeprefix("torch."),
            "tensor_parallel_size": self.config.parallel_config.tensor_parallel_size,
            **self.in_worker,
            "rows_skip": self.all_rows is None,
            "why_not": self.all_rows,
        }

    def ask(self, case: Case) -> tuple[list[Answer], list[str]]:
        """The answers to a case's requests, and what did not happen that it is there for, a clause each."""
        skipped, preempted, answers, hit = self.metric(SKIPPED), self.metric(PREEMPTIONS), [], 0
        for batch in case.batches:
            prompts: list[Any] = [{"prompt_token_ids": request.prompt} for request in batch]
            outputs = self.llm.generate(prompts, [parameters(request) for request in batch], use_tqdm=False)
            answers += [answer(request, output) for request, output in zip(batch, outputs, strict=True)]
            hit = max(hit, *(output.num_cached_tokens or 0 for output in outputs))
        happened = Happened(
            step=self.config.scheduler_config.max_num_batched_tokens,
            hit=hit,
            preempted=int(self.metric(PREEMPTIONS) - preempted),
            skipped=int(self.metric(SKIPPED) - skipped),
        )
        return answers, list(case.missed(happened, may_skip=self.all_rows is None))

    def metric(self, name: str) -> float:
        """The sum over all engines that this process has had."""
        return sum(found.value for found in self.llm.get_metrics() if found.name == name)  # type: ignore[attr-defined]  # counters


def parameters(request: Request) -> SamplingParams:
    of_request = {"max_tokens": request.tokens, "prompt_logprobs": 1 if request.scored else None}
    return SamplingParams(**GREEDY | of_request)


def answer(request: Request, output: Any) -> Answer:
    """What of vLLM's RequestOutput is compared."""

    def plain(rows: Any) -> list[Any]:
        return [row and {token: entry.logprob for token, entry in row.items()} for row in rows or []]

    completion = output.outputs[0]
    return Answer(request.prompt, list(completion.token_ids), plain(completion.logprobs), plain(output.prompt_logprobs))


def in_force(worker: Any) -> dict[str, Any]:
    """Run in a worker: how the model is compiled, which attention it has and how its caches are grouped."""
    runner = worker.model_runner
    compilation = runner.vllm_config.compilation_config
    layers = compilation.static_forward_context
    groups = runner.kv_cache_config.kv_cache_groups
    return {
        "attention_backends": sorted(
            {layers[name].attn_backend.get_name() for group in groups for name in group.layer_names}
        ),
        "compilation_mode": compilation.mode.name,
        "cudagraph_mode": compilation.cudagraph_mode.name,
        "kv_groups": [
            {
                "caches": len(group.layer_names),
                "block": group.kv_cache_spec.block_size,
                "window": layers[group.layer_names[0]].sliding_window,
            }
            for group in groups
        ],
        "kv_blocks": runner.kv_cache_config.num_blocks,
    }
