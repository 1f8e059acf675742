"""KV cache groups and bytes of both layouts, read from vLLM's block pool, next to the bytes by the formula."""

from benchmarks.engine import LAYOUTS, block_bytes, config, core, start, stop

from typing import Any

from vllm import LLM, SamplingParams
from vllm.v1.request import Request

from benchmarks.console import progress, publish
from benchmarks.results import Result
from vllm_yocou.cli.sizing import KVBytes

SHAPES = ("paper 1.3B", "57M", "yoco-u-kjv")
LENGTHS = (200, 4096, 32768)
CHUNK = 1024
BYTES = 2  # bfloat16
NAMES = {"naive": "one group a cache", "packed": "packed"}
FORMULA = "formula, without blocks"


def held_in_decode(llm: LLM, tokens: int) -> int:
    """Blocks that a request of `tokens` holds in decode, after a prompt in chunks; nothing is computed."""
    manager = core(llm).scheduler.kv_cache_manager
    request, free = Request("0", [1] * tokens, SamplingParams(), None), manager.block_pool.get_num_free_blocks()
    while request.num_computed_tokens < tokens:
        chunk = max(1, min(CHUNK, tokens - 1 - request.num_computed_tokens))
        assert manager.allocate_slots(request, chunk) is not None
        request.num_computed_tokens += chunk
    held = free - manager.block_pool.get_num_free_blocks()
    manager.free(request)
    return held


def measure() -> Result:
    result = Result.here("kv_layout", dtype="bfloat16", chunk=CHUNK)
    for shape in SHAPES:
        # The model's width does not change its caches.
        cfg = config(shape, hidden_size=64, intermediate_size=64)
        for layout, options in LAYOUTS.items():
            progress(f"{shape}, {NAMES[layout]}")
            settings: dict[str, Any] = dict(dtype="bfloat16", max_model_len=LENGTHS[-1], max_num_batched_tokens=CHUNK)
            settings |= dict(enforce_eager=True)  # nothing runs that is worth compiling
            llm = start(cfg, kv_cache_memory_bytes=1 << 30, additional_config={"yocou": options}, **settings)
            groups = core(llm).scheduler.kv_cache_config.kv_cache_groups
            of = dict(shape=shape, layout=NAMES[layout])
            result.add("KV groups", "groups", len(groups), **of)
            result.add("block", "bytes", block_bytes(llm), **of)
            longest = max(group.kv_cache_spec.block_size for group in groups)
            result.add("global tokens of a block", "tokens", longest, **of)
            for tokens in LENGTHS:
                size = held_in_decode(llm, tokens) * block_bytes(llm)
                result.add("KV cache", "MiB", size / 2**20, **of, tokens=tokens)
            stop(llm)
        for tokens in LENGTHS:
            size = KVBytes.yoco_u(cfg, BYTES).of_request(tokens)
            result.add("KV cache", "MiB", size / 2**20, shape=shape, layout=FORMULA, tokens=tokens)
    return result


if __name__ == "__main__":
    publish(measure())
