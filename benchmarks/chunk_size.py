"""What `max_num_batched_tokens` costs: KV cache that one request holds while its prompt is computed, and time."""

from benchmarks.engine import block_bytes, config, core, start  # isort: skip
import statistics
import time

from vllm import SamplingParams

from benchmarks.table import print_table

CHUNKS = (256, 512, 1024, 2048, 4096, 8192)
TOKENS, ROUNDS = 8192, 2
SHAPE = "57M"


class Prompt:
    """One engine; the chunk is the scheduler's budget of a step."""

    def __init__(self):
        settings = dict(max_model_len=TOKENS + 1, max_num_seqs=4, max_num_batched_tokens=max(CHUNKS) + 1)
        self.llm = start(config(SHAPE), kv_cache_memory_bytes=2 << 30, **settings)
        self.scheduler = core(self.llm).scheduler
        assert self.scheduler.max_num_scheduled_tokens > max(CHUNKS)
        self.block_bytes = block_bytes(self.llm)

    def measure(self, chunk: int) -> tuple[float, float]:
        """Seconds of the prompt, and MiB that it held at most."""
        self.scheduler.max_num_scheduled_tokens = chunk
        pool = self.scheduler.kv_cache_manager.block_pool
        free = least = pool.get_num_free_blocks()
        allocate = self.scheduler.kv_cache_manager.allocate_slots

        def watched(*args, **kwargs):
            nonlocal least
            blocks = allocate(*args, **kwargs)
            least = min(least, pool.get_num_free_blocks())
            return blocks

        self.scheduler.kv_cache_manager.allocate_slots = watched
        start_s = time.perf_counter()
        parameters = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        self.llm.generate([{"prompt_token_ids": [5] * TOKENS}], parameters, use_tqdm=False)
        seconds = time.perf_counter() - start_s
        self.scheduler.kv_cache_manager.allocate_slots = allocate
        return seconds, (free - least) * self.block_bytes / 2**20


def main() -> None:
    prompt = Prompt()
    prompt.measure(512)
    measured = {chunk: [] for chunk in CHUNKS}
    for _ in range(ROUNDS):
        for chunk in CHUNKS:
            measured[chunk].append(prompt.measure(chunk))
    seconds = {chunk: statistics.median(s for s, _ in measured[chunk]) for chunk in CHUNKS}
    whole = seconds[max(CHUNKS)]
    rows = [[c, f"{measured[c][0][1]:.1f} MiB", f"{seconds[c]:.2f} s", f"{whole / seconds[c]:.2f}x"] for c in CHUNKS]
    note = f"{SHAPE} shape, float32, a prompt of {TOKENS} tokens, medians of {ROUNDS} rounds in turn."
    header = ["tokens a step", "KV cache held at most", "prefill", f"speed against {max(CHUNKS)}"]
    print_table("Chunk size", note, header, rows)


if __name__ == "__main__":
    main()
