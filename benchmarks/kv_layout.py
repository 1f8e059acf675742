"""KV cache groups and bytes: one group a layer and iteration, packed, and the formula, read from vLLM's block pool."""

from benchmarks.engine import LAYOUTS, block_bytes, config, core, start, stop  # isort: skip
from vllm import SamplingParams
from vllm.v1.request import Request

from benchmarks.table import print_table
from vllm_yocou.cli.kv_bytes import KVBytes

LENGTHS = (200, 4096, 32768)
CHUNK = 1024
BYTES = 2  # bfloat16


def held_in_decode(llm, tokens: int) -> int:
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


def row(shape: str, layout: str, groups, block, sizes: list[int]) -> list:
    cells = [f"{size / 2**20:.2f} MiB, {tokens * 2**30 // size:,}" for size, tokens in zip(sizes, LENGTHS, strict=True)]
    return [shape, layout, groups, block, *cells]


def main() -> None:
    rows = []
    for shape in ("paper 1.3B", "57M", "yoco-u-kjv"):
        # No cache sees the width of the model.
        cfg = config(shape, hidden_size=64, intermediate_size=64)
        for layout, options in LAYOUTS.items():
            settings = dict(dtype="bfloat16", max_model_len=LENGTHS[-1], max_num_batched_tokens=CHUNK)
            llm = start(cfg, kv_cache_memory_bytes=1 << 30, additional_config={"yocou": options}, **settings)
            kv_config = core(llm).scheduler.kv_cache_config
            sizes = [held_in_decode(llm, tokens) * block_bytes(llm) for tokens in LENGTHS]
            block = max(group.kv_cache_spec.block_size for group in kv_config.kv_cache_groups)
            rows.append(
                row(shape, layout, len(kv_config.kv_cache_groups), f"{block_bytes(llm) >> 10} KiB, {block}", sizes)
            )
            stop(llm)
        rows.append(
            row(shape, "formula", "", "", [KVBytes.yoco_u(cfg, BYTES).of_request(tokens) for tokens in LENGTHS])
        )
    header = ["shape", "layout", "KV groups", "block: bytes, global tokens"]
    header += [f"{tokens} tokens: bytes a request, tokens per GiB" for tokens in LENGTHS]
    print_table("KV cache layouts", "bfloat16, one request in decode, blocks counted in vLLM's pool.", header, rows)


if __name__ == "__main__":
    main()
