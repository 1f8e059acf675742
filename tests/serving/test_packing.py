"""The packing rule, and what vLLM's scheduler really holds with it: read from the block pool, one token at a time."""

from math import ceil

import pytest
from harness import tiny
from harness.engines import generate, kv_cache_config
from vllm import SamplingParams
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.request import Request

from vllm_yocou.cli.sizing import KVBytes
from vllm_yocou.config import YocoUConfig
from vllm_yocou.options import Options
from vllm_yocou.serving.cache_specs import GlobalCacheSpec, WindowCacheSpec
from vllm_yocou.serving.caches import packing_of
from vllm_yocou.serving.packing import Packing

LIMIT = Options().longest_global_block(window=512)


def choose(windows: int, block: int, window_bytes: int = 1024, global_bytes: int = 1024, limit: int = LIMIT) -> Packing:
    return Packing.choose(windows, block, window_bytes, global_bytes, limit)


@pytest.mark.parametrize("block, layers, groups", [(32, 15, 3), (16, 30, 2)], ids=["cpu", "cuda"])
def test_the_papers_shape_needs_few_groups(block, layers, groups):
    """T = 3, S = 10, where one group a layer and iteration would make 31."""
    chosen = choose(30, block)
    assert (chosen.layers_per_block, chosen.groups + 1) == (layers, groups)
    assert chosen.global_block == layers * block and chosen.waste == 0


@pytest.mark.parametrize("windows", [1, 2, 5, 7, 12, 30, 36, 37, 77])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("window_bytes, global_bytes", [(8, 8), (8, 4), (4, 8), (6, 8), (8, 5)])
def test_no_packing_with_fewer_groups_keeps_the_limit(windows, block, window_bytes, global_bytes):
    chosen = choose(windows, block, window_bytes, global_bytes)

    def global_block(groups: int) -> int:
        page = ceil(windows / groups) * block * window_bytes
        return next(tokens for tokens in range(block, 10**6, block) if tokens * global_bytes >= page)

    assert chosen.global_block == global_block(chosen.groups)
    assert chosen.global_block <= LIMIT or chosen.groups == windows
    assert all(global_block(groups) > LIMIT for groups in range(1, chosen.groups))
    assert 0 <= chosen.waste < 1


def test_the_limit_is_a_choice():
    assert choose(30, 32, limit=100).layers_per_block == 3
    assert choose(30, 32, limit=960).groups == 1
    assert choose(30, 32, limit=1).groups == 30
    # No block is smaller than the backend's, and vLLM fills one with all the caches that it has room for.
    assert choose(30, 32, window_bytes=1, global_bytes=3, limit=1).layers_per_block == 3


def test_caches_that_do_not_divide_waste_what_is_said():
    prime = choose(37, 32)
    assert (prime.groups, prime.layers_per_block) == (3, 13)
    assert prime.waste == pytest.approx(2 / 39) and "5.1% of the window blocks unused" in str(prime)
    odd_bytes = choose(5, 32, window_bytes=6, global_bytes=8)
    assert odd_bytes.global_block == 4 * 32 and odd_bytes.waste == pytest.approx(1 - 30 / 32)


# T·S window caches of W tokens: engines whose pool is looked at. Not one of the sizes divides another in "odd".
SHAPES = {
    "paper": dict(num_iterations=3, num_self_decoder_layers=10, num_hidden_layers=11, sliding_window=512),
    "one-block-a-cache": dict(num_iterations=2, num_self_decoder_layers=3, sliding_window=45),
    "odd": dict(
        num_iterations=7,
        num_self_decoder_layers=1,
        sliding_window=33,
        num_attention_heads=6,
        num_key_value_heads=3,
        cross_num_attention_heads=2,
        cross_num_key_value_heads=2,
        cross_head_dim=80,
    ),
}
OPTIONS = {"one-block-a-cache": {"max_global_block": 1}}
CONTEXT, CHUNK, POOL = 100_000, 1000, 200 << 20


class Pool:
    """The block pool of a real engine, and requests that take slots in it without being computed."""

    def __init__(self, llm):
        engine = llm.llm_engine.engine_core.engine_core
        self.config = engine.vllm_config.model_config.hf_config
        self.vllm_config, self.kv_config = engine.vllm_config, engine.scheduler.kv_cache_config
        self.manager = engine.scheduler.kv_cache_manager
        self.packing: Packing = packing_of(self.vllm_config)
        self.everything = self.available

    def formula(self, tokens: int) -> int:
        """Bytes by the paper's formula (arXiv 2604.01220)."""
        cfg = self.config
        window = 2 * cfg.num_key_value_heads * cfg.head_dim * 4 * min(tokens, cfg.sliding_window)
        everything = 2 * cfg.cross_num_key_value_heads * cfg.cross_head_dim * 4 * tokens
        return window * cfg.num_iterations * cfg.num_self_decoder_layers + everything

    def formula_in_blocks(self, tokens: int) -> int:
        """The same, the global cache rounded up to a block and a window to pages, of which it may touch one more."""
        cfg, packing = self.config, self.packing
        pages = ceil(min(tokens, cfg.sliding_window) / packing.window_block) + (tokens > cfg.sliding_window)
        return (packing.groups * pages + ceil(tokens / packing.global_block)) * packing.block_bytes

    def request(self, tokens: int, index: int = 0) -> Request:
        return Request(str(index), [1] * tokens, SamplingParams(max_tokens=1), None)

    def grow(self, request: Request, chunk: int) -> int | None:
        """Compute `chunk` more tokens; the blocks then taken from the pool, or None if it has not enough."""
        if self.manager.allocate_slots(request, chunk) is None:
            return None
        request.num_computed_tokens += chunk
        return self.everything - self.available

    def held(self, request: Request) -> int:
        groups = self.manager.coordinator.single_type_managers
        return sum(not block.is_null for group in groups for block in group.req_to_blocks[request.request_id])

    def free(self, request: Request) -> None:
        self.manager.free(request)

    @property
    def available(self) -> int:
        return self.manager.block_pool.get_num_free_blocks()


@pytest.fixture(scope="module", params=SHAPES)
def pool(request, module_engine, tmp_path_factory):
    folder, shape = tmp_path_factory.mktemp("checkpoint"), request.param
    tiny.model(tiny.config(**dict(max_position_embeddings=CONTEXT) | SHAPES[shape])).save_pretrained(folder)
    llm = module_engine(
        folder,
        max_model_len=CONTEXT,
        max_num_batched_tokens=CHUNK,
        kv_cache_memory_bytes=POOL,
        enable_prefix_caching=False,
        additional_config={"yocou": OPTIONS.get(shape, {})},
    )
    yield Pool(llm)
    module_engine.stop()


def touched(start: int, end: int, block: int) -> int:
    """Blocks that tokens [start, end) lie in."""
    return ceil(end / block) - start // block


def test_groups_are_the_packings(pool):
    sizes = sorted(len(group.layer_names) for group in pool.kv_config.kv_cache_groups)
    groups, caches = pool.packing.groups, pool.packing.window_caches
    assert len(sizes) == groups + 1 and sum(sizes) == caches + 1
    assert sizes[-1] == pool.packing.layers_per_block
    (tensor_bytes,) = {tensor.size for tensor in pool.kv_config.kv_cache_tensors} or {0}
    assert tensor_bytes == pool.kv_config.num_blocks * pool.packing.block_bytes <= POOL
    specs = {type(group.kv_cache_spec) for group in pool.kv_config.kv_cache_groups}
    assert specs == {WindowCacheSpec, GlobalCacheSpec}


def test_a_decoding_request_holds_the_formula_rounded_up_to_blocks(pool):
    """The paper's formula, for every number of tokens from 1 to 100k; everything before the window is freed."""
    window, packing = pool.config.sliding_window, pool.packing
    request = pool.request(CONTEXT)
    for tokens in range(1, CONTEXT + 1):
        held = pool.grow(request, 1)
        pages = touched(max(0, tokens - window), tokens, packing.window_block)
        assert held == packing.groups * pages + touched(0, tokens, packing.global_block)
        assert pool.formula(tokens) <= held * packing.block_bytes <= pool.formula_in_blocks(tokens)
        assert held <= packing.blocks(tokens, window)
        if tokens % 997 == 0:
            assert pool.held(request) == held
    pool.free(request)
    assert pool.available == pool.everything


def test_the_calculator_is_within_one_block_a_group(pool):
    """`vllm-yocou kv` prints the formula; vLLM adds what blocks hold before a window and after the last token.

    A window that is not a whole number of pages may both begin and end inside one.
    """
    window, packing = pool.config.sliding_window, pool.packing
    cost = KVBytes.yoco_u(pool.config, element_bytes=4)
    ragged = 1 if window % packing.window_block else 0
    allowed = packing.groups * (1 + ragged) + 1
    request, most = pool.request(CONTEXT), 0.0
    for tokens in range(1, 3 * packing.global_block + window):
        allocated = pool.grow(request, 1) * packing.block_bytes
        # Caches or bytes that do not divide leave a share of the window blocks empty, as the log says at the start.
        used = allocated - packing.waste * (allocated - ceil(tokens / packing.global_block) * packing.block_bytes)
        most = max(most, (used - cost.of_request(tokens)) / packing.block_bytes)
        assert allocated >= cost.of_request(tokens)
    pool.free(request)
    assert 0.5 * allowed < most <= allowed


def test_a_prompt_in_chunks_stays_within_what_vllm_promises(pool):
    """vLLM's start-up line divides the pool by what a request of the full context takes: more is never held."""
    window, packing, request, peak = pool.config.sliding_window, pool.packing, pool.request(CONTEXT), 0
    for end in range(CHUNK, CONTEXT + 1, CHUNK):
        held = pool.grow(request, CHUNK)
        assert held <= packing.blocks(end, window, CHUNK)
        peak = max(peak, held)
    pool.free(request)
    cache_config = pool.vllm_config.cache_config
    promised = pool.kv_config.num_blocks / cache_config.kv_cache_max_concurrency
    assert 0 <= promised - peak <= 2 * packing.groups
    assert 0 <= promised - packing.blocks(CONTEXT, window, CHUNK) <= packing.groups
    assert cache_config.kv_cache_size_tokens == int(CONTEXT * cache_config.kv_cache_max_concurrency)


def test_a_token_in_flight_is_held_once_more(pool):
    """As where vLLM schedules a step while another one is computed: the window ends a token earlier."""
    window, packing, request = pool.config.sliding_window, pool.packing, pool.request(CONTEXT)
    for tokens in range(1, 3 * window + packing.global_block):
        request.num_in_flight_tokens = min(1, request.num_computed_tokens)
        held = pool.grow(request, 1)
        pages = touched(max(0, tokens - window - 1), tokens, packing.window_block)
        assert held == packing.groups * pages + touched(0, tokens, packing.global_block)
        assert held <= packing.blocks(tokens, window, in_flight=2)
    pool.free(request)


def test_tokens_that_fit_in_the_budget(pool):
    """Requests are let in until the pool is full: as many as the formula, rounded up to blocks, has room for."""
    tokens, window, packing = 5003, pool.config.sliding_window, pool.packing
    each = packing.groups * touched(tokens - window, tokens, packing.window_block) + ceil(tokens / packing.global_block)
    expected, requests = pool.available // each, []
    while True:
        requests.append(pool.request(tokens, len(requests)))
        # In one chunk, then as in decode: one token more, and what is before the window is free again.
        if pool.grow(requests[-1], tokens - 1) is None or pool.grow(requests[-1], 1) is None:
            break
    for request in requests:
        pool.free(request)
    held = packing.blocks(tokens, window, tokens)  # the last one to be let in takes its windows in full for a moment
    assert expected - ceil(held / each) <= len(requests) - 1 <= expected


# The authors' production model but for what its caches do not depend on.
PRODUCTION = dict(
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=20,
    num_self_decoder_layers=10,
    num_iterations=3,
    sliding_window=513,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    differential_attention="v3",
    attention_bias=True,
    residual_in_fp32=True,
    qk_norm="all",
    qk_clip_limit=3.0,
    max_position_embeddings=131_072,
)


@pytest.mark.parametrize("block, layers, mebibytes", [(16, 30, 575.6), (32, 15, 577.5)], ids=["cuda", "cpu"])
def test_the_authors_switches_leave_the_caches_as_they_are(block, layers, mebibytes, engine, tmp_path, monkeypatch):
    """64 query heads in pairs over 8 KV heads; the same window and global caches as 32 heads alone would have."""
    YocoUConfig(architectures=["YocoUForCausalLM"], vocab_size=tiny.VOCABULARY, **PRODUCTION).save_pretrained(tmp_path)
    monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", lambda spec=None: [MultipleOf(block)])
    llm = engine(
        tmp_path,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=131_072,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=700 << 20,
        enable_prefix_caching=False,
    )
    pool = Pool(llm)
    groups = [len(group.layer_names) for group in pool.kv_config.kv_cache_groups]
    assert sorted(groups) == [1, *[layers] * (30 // layers)]
    token_bytes = 2 * 8 * 128 * 2
    assert pool.packing.block_bytes == layers * block * token_bytes
    request = pool.request(131_072)
    assert pool.grow(request, 511) is not None
    while request.num_computed_tokens < 131_071:
        assert pool.grow(request, 512) is not None
    held = pool.grow(request, 1)
    assert held * pool.packing.block_bytes / 2**20 == pytest.approx(mebibytes, abs=0.05)


@pytest.mark.parametrize("limit", [1, 100, 512])
def test_a_repeated_prompt_hits_whole_global_blocks(limit, engine, tmp_path, lines):
    """As the log says, which also says how many blocks vLLM finds for it."""
    tiny.model(tiny.config(num_iterations=5, sliding_window=97)).save_pretrained(tmp_path)
    options = {"yocou": {"max_global_block": limit}}
    llm = engine(tmp_path, kv_cache_memory_bytes=32 << 20, additional_config=options, max_num_batched_tokens=101)
    groups = kv_cache_config(llm).kv_cache_groups
    block = max(group.kv_cache_spec.block_size for group in groups)
    assert (block, len(groups)) == {1: (32, 11), 100: (96, 5), 512: (320, 2)}[limit]
    prompt = tiny.prompt(777)
    first, second = (generate(llm, [prompt], tokens=4)[0] for _ in range(2))
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 776 // block * block)
    engine_core = llm.llm_engine.engine_core.engine_core
    hasher = engine_core.request_block_hasher
    request = Request("third", prompt, SamplingParams(max_tokens=1), None, block_hasher=hasher)
    found, cached, _ = engine_core.scheduler.kv_cache_manager.get_computed_blocks(request)
    of_windows = sum(not one.is_null for group in found.blocks for one in group) - cached // block
    said = f"multiples of {block} tokens: a cached prefix takes a block of the pool for each {block} tokens and "
    assert f"{said}{of_windows} blocks for its last 96." in "\n".join(lines)


def test_a_window_of_one_token_has_no_hits():
    assert choose(30, 32).prefix_cost(window=1) == "vLLM finds no prefix-cache hits with a window of one token."
