"""Bytes of a request that a KV connector moves, beside what it would move if every cache kept every token."""

from benchmarks.engine import block_bytes, config, start, stop

from benchmarks.console import progress, publish
from benchmarks.kv_layout import held_in_decode
from benchmarks.results import Result
from vllm_yocou.cli.sizing import KVBytes

SHAPE = "paper 1.3B"
LENGTHS = (1 << 10, 1 << 13, 1 << 16, 1 << 18)
BYTES = 2  # bfloat16
ALL = "all 31 caches whole"


def measure() -> Result:
    result = Result.here("moved_kv", shape=SHAPE, dtype="bfloat16")
    cfg = config(SHAPE)
    progress(SHAPE)
    # The model's width does not change its caches.
    narrow = config(SHAPE, hidden_size=64, intermediate_size=64)
    llm = start(narrow, kv_cache_memory_bytes=1 << 30, dtype="bfloat16", max_model_len=LENGTHS[-1], enforce_eager=True)
    caches = KVBytes.yoco_u(cfg, BYTES)
    for tokens in LENGTHS:
        moved = {
            "blocks that a request holds": held_in_decode(llm, tokens) * block_bytes(llm),
            ALL: (caches.token + caches.window_token) * tokens,
            f"Transformer, {cfg.num_hidden_layers} layers": KVBytes.transformer(cfg, BYTES).of_request(tokens),
        }
        for what, size in moved.items():
            result.add("moved", "MiB", size / 2**20, tokens=tokens, what=what)
    stop(llm)
    return result


if __name__ == "__main__":
    publish(measure())
