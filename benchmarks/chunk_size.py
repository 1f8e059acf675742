"""What `max_num_batched_tokens` costs: KV cache that one request holds while its prompt is computed, and time."""

from benchmarks.engine import block_bytes, config, core, start

import time
from typing import Any

from vllm import SamplingParams
from vllm.inputs import TokensPrompt

from benchmarks.console import progress, publish
from benchmarks.precision import in_each_dtype
from benchmarks.results import Result

CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
TOKENS, ROUNDS = 8192, 2
SHAPE = "57M"


class Prompt:
    """One engine; the chunk is the scheduler's budget of a step."""

    def __init__(self, dtype: str) -> None:
        settings: dict[str, Any] = dict(dtype=dtype, max_model_len=TOKENS + 1, max_num_seqs=4)
        settings |= dict(max_num_batched_tokens=max(CHUNKS) + 1)
        self.llm = start(config(SHAPE), kv_cache_memory_bytes=2 << 30, **settings)
        self.scheduler = core(self.llm).scheduler
        assert self.scheduler.max_num_scheduled_tokens > max(CHUNKS)
        self.block_bytes = block_bytes(self.llm)

    def measure(self, chunk: int) -> tuple[float, float]:
        """Seconds that the prompt took, and the most MiB that it held."""
        self.scheduler.max_num_scheduled_tokens = chunk
        pool = self.scheduler.kv_cache_manager.block_pool
        free = least = pool.get_num_free_blocks()
        allocate = self.scheduler.kv_cache_manager.allocate_slots

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal least
            blocks = allocate(*args, **kwargs)
            least = min(least, pool.get_num_free_blocks())
            return blocks

        self.scheduler.kv_cache_manager.allocate_slots = watched
        start_s = time.perf_counter()
        parameters = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        self.llm.generate([TokensPrompt(prompt_token_ids=[5] * TOKENS)], parameters, use_tqdm=False)
        seconds = time.perf_counter() - start_s
        self.scheduler.kv_cache_manager.allocate_slots = allocate
        return seconds, (free - least) * self.block_bytes / 2**20


def measure(dtype: str = "float32") -> Result:
    prompt = Prompt(dtype)
    prompt.measure(min(CHUNKS))
    measured: dict[int, list[tuple[float, float]]] = {chunk: [] for chunk in CHUNKS}
    for number in range(ROUNDS):
        for chunk in CHUNKS:
            progress(f"chunks of {chunk}, round {number + 1} of {ROUNDS}")
            measured[chunk].append(prompt.measure(chunk))
    result = Result.here("chunk_size", shape=SHAPE, dtype=dtype, tokens=TOKENS, rounds=ROUNDS)
    for chunk, runs in measured.items():
        seconds, held = zip(*runs, strict=True)
        result.add("prefill", "s", seconds, chunk=chunk)
        result.add("KV cache held at most", "MiB", held, chunk=chunk)
    return result


if __name__ == "__main__":
    publish(in_each_dtype(measure))
