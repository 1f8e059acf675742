"""How many requests a pool holds: counted by hand, and by filling the pool of a running engine."""

import json
import sys

import pytest
from harness import tiny
from harness.engines import metric
from vllm import SamplingParams

from vllm_yocou.cli import command_line
from vllm_yocou.serving.cache_specs import WindowCacheSpec
from vllm_yocou.serving.caches import GlobalCache, packing_of
from vllm_yocou.serving.capacity import Capacity, Load
from vllm_yocou.serving.packing import Packing

# The trained example in float32 on a CPU with one window group: nine caches of 32 tokens a block, 288 global tokens.
TRAINED = Packing.choose(window_caches=9, block=32, window_bytes=512, global_bytes=512, max_global_block=512)


def test_counted_by_hand():
    """24 MiB for requests of 2,048 tokens, W 64: 11 blocks in decode, of which 3 are the windows', 43 in prefill."""
    load = Load(tokens=2048, window=64, chunk=1024)
    blocks = (24 << 20) // TRAINED.block_bytes
    assert (blocks, TRAINED.blocks(2048, 64, 1), TRAINED.admitted(2048, 64, 1024)) == (170, 11, 43)
    assert Capacity.of(TRAINED, load, blocks) == Capacity(170, together=12, guaranteed=3)
    # The last block that the twelfth needs, and the one that vLLM keeps empty.
    least = 11 * 11 + 43 + 1
    assert [Capacity.of(TRAINED, load, n).together for n in (least - 1, least)] == [11, 12]
    assert [Capacity.of(TRAINED, load, n).guaranteed for n in (3 * 43, 3 * 43 + 1)] == [2, 3]
    assert [Capacity.of(TRAINED, load, n).together for n in (0, 43, 44, 54, 55)] == [0, 0, 1, 1, 2]


def test_what_vllm_keeps_free_beside_others():
    load = Load(tokens=2048, window=64, chunk=1024)
    assert [Capacity.of(TRAINED, load, 170, spare).together for spare in (5, 6, 126, 169)] == [12, 11, 1, 1]


def test_a_limit_below_what_fits_is_said():
    said = [Capacity(170, together=12, guaranteed=3).describe(2048, sequences) for sequences in (11, 12)]
    assert ["max_num_seqs lets 11 run" in line for line in said] == [True, False]
    assert (
        Capacity(50, together=1, guaranteed=1).describe(2048, 8).endswith("holds 1 request of 2,048 tokens at a time.")
    )


def test_steps_in_flight_and_drafts_take_blocks():
    """W 64: two steps of 1 + 15 tokens in decode make 95 tokens, 4 pages; two of 1024 in prefill the whole prompt."""
    load = Load(tokens=2048, window=64, chunk=1024, steps=2, decoded=16)
    decode, prefill = 4 + 8, 64 + 8
    assert Capacity.of(TRAINED, load, 1 + prefill + 3 * decode).together == 4
    assert Capacity.of(TRAINED, load, prefill + 3 * decode).together == 3


@pytest.mark.parametrize("in_flight", [1, 2, 31, 32, 33, 64, 1000, 10_000])
@pytest.mark.parametrize("window", [1, 2, 32, 33, 64, 100])
def test_vllm_admits_what_is_said(window, in_flight):
    page = dict(num_kv_heads=2, head_size=32, head_size_v=32, dtype=None)
    spec = WindowCacheSpec(block_size=32, sliding_window=window, **page)
    for tokens in (1, 31, 32, 33, 288, 289, 2048):
        cap = spec.max_admission_blocks_per_request(in_flight, tokens)
        assert TRAINED.admitted(tokens, window, in_flight) == min(-(-tokens // 32), cap) + -(-tokens // 288)


# T, and by hand the blocks of a request of 256 tokens, W 33, in decode and in prefill by chunks of 64: a window of 33
# tokens always lies in two pages, 32 + 64 tokens may lie in four, and a global block has T · 2 pages of 32 tokens.
CONTEXT, CHUNK, BESIDE = 256, 64, 3
SHAPES = [
    pytest.param(1, 2 + 4, 4 + 4, False, marks=pytest.mark.slow),
    pytest.param(2, 2 + 2, 4 + 2, True, marks=pytest.mark.slow),
    pytest.param(3, 2 + 2, 4 + 2, True),
]


@pytest.mark.parametrize("iterations, decode, prefill, prefix_caching", SHAPES)
def test_the_pool_is_full_with_as_many_requests_as_the_log_says(
    iterations, decode, prefill, prefix_caching, engine, tmp_path, lines, monkeypatch, capsys
):
    """They run together without a preemption; one more waits, and so does the last one if the pool lacks a block."""
    tiny.model(tiny.config(num_iterations=iterations, sliding_window=33)).save_pretrained(tmp_path)
    blocks, together = 1 + prefill + BESIDE * decode, BESIDE + 1
    settings = dict(max_model_len=CONTEXT, max_num_batched_tokens=CHUNK, enable_prefix_caching=prefix_caching)
    llm = engine(tmp_path, num_gpu_blocks_override=blocks, **settings)
    guaranteed = (blocks - 1) // prefill
    assert sum("at a time" in line for line in lines) == 1
    assert sum("Prefix-cache hits" in line for line in lines) == prefix_caching
    said = f"{blocks} blocks holds {together} requests of {CONTEXT} tokens at a time, {BESIDE} in decode beside 1 in "
    assert f"{said}prefill. If all are in prefill, {guaranteed} fit: " in lines[-1]
    assert together > llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency

    assert most_running(llm, together + 1) == (together, 0)
    # A block less, held by nobody.
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    held = pool.get_new_blocks(1)
    assert most_running(llm, together) == (together - 1, 0)
    pool.free_blocks(held)

    vllm_config = llm.llm_engine.vllm_config
    budget = blocks * packing_of(vllm_config).block_bytes
    options = f"--device cpu --kv-cache-dtype float32 --max-num-batched-tokens {CHUNK} --context {CONTEXT} --json"
    monkeypatch.setattr(sys, "argv", ["vllm-yocou", "kv", str(tmp_path), "--budget", str(budget), *options.split()])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command_line.main()
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert (row["together_in_budget"], row["guaranteed_in_budget"]) == (together, guaranteed)

    # Nothing is said of the small pool that vLLM binds to measure CUDA graphs, before it sets the number of blocks.
    layers = vllm_config.compilation_config.static_forward_context.values()
    (cache,) = (layer for layer in layers if isinstance(layer, GlobalCache))
    said, vllm_config.cache_config.num_gpu_blocks = len(lines), None
    cache.bind_kv_cache(cache.kv_cache)
    assert len(lines) == said


def most_running(llm, requests: int) -> tuple[int, int]:
    """Requests of the whole context that ran at the same time while others waited, at most, and preemptions."""
    scheduler, before = llm.llm_engine.engine_core.engine_core.scheduler, metric(llm, "vllm:num_preemptions")
    parameters = SamplingParams(temperature=0, max_tokens=CONTEXT - 200, ignore_eos=True, detokenize=False)
    for number in range(requests):
        prompt = {"prompt_token_ids": tiny.prompt(200, seed=number)}  # with the last of a request's global blocks
        llm.llm_engine.add_request(str(number), prompt, parameters)
    most = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        if len(scheduler.waiting):
            most = max(most, len(scheduler.running))
    return most, int(metric(llm, "vllm:num_preemptions") - before)
