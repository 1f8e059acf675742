"""The plugin's Triton kernels compared with what they would replace: time, share of a measured device copy, ratios.

Shapes: the paper's (20 query and 4 KV heads of 128, W 512), bfloat16; a decode step of N requests. A graph launches a
contestant on many sets of tensors, more than a GPU's second-level cache holds, because a step walks through all caches.
"""

from benchmarks.engine import SHAPES

import importlib.util
import sys
from collections.abc import Callable

import torch
import triton
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash
from vllm.v1.attention.ops.triton_unified_attention import unified_attention

from benchmarks.console import progress, publish
from benchmarks.results import Key, Result
from vllm_yocou.kernels.arguments import Batch, Rotation
from vllm_yocou.kernels.cross_attention import cross_attention
from vllm_yocou.kernels.global_write import global_write
from vllm_yocou.kernels.naive import turned
from vllm_yocou.kernels.window_step import window_step

PAPER = SHAPES["paper 1.3B"]
H, K, d, W = (PAPER[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"))
BATCHES = (1, 8, 64)
CONTEXTS = (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18)
GLOBAL_BLOCK, WINDOW_BLOCK, CACHES_A_BLOCK = 512, 32, 16
ROUNDS = 3
COPIED_BYTES = 1 << 30
MOST_SETS = 64
COLD_BYTES = 256 << 20  # of keys and values that a graph reads: several times the second-level cache
POOL_BYTES = 100 << 30  # of keys and values at most: larger shapes are left out

TRITON = "vLLM's Triton"

Contestants = dict[str, Callable[[], torch.Tensor]]


def decodes(
    requests: int, context: int, block: int, caches: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, Batch, torch.Tensor]:
    """The last row of each request of `context` tokens: (keys, values, batch, slots), packed as the engine packs."""
    blocks_each = triton.cdiv(context, block)
    table_RX = torch.randperm(requests * blocks_each).view(requests, blocks_each).int()
    batch = Batch(table_RX, torch.arange(requests + 1).int(), torch.full((requests,), context).int())
    pool_BLSKd = torch.randn(requests * blocks_each, caches, block, K, 2 * d, dtype=dtype)
    last = context - 1
    slots_N = table_RX[:, last // block].long() * block + last % block
    keys, values = pool_BLSKd[:, caches // 2].chunk(2, dim=-1)
    return keys, values, batch, slots_N


def vllm_attention(
    q_NHd: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: Batch,
    context: int,
    window: int | None = None,
) -> Contestants:
    """vLLM's attention kernels that run on this machine, over the same cache."""
    out_NHd = torch.empty_like(q_NHd)
    common = dict(
        q=q_NHd,
        k=keys,
        v=values,
        out=out_NHd,
        cu_seqlens_q=batch.starts_R1,
        max_seqlen_q=1,
        seqused_k=batch.lengths_R,
        max_seqlen_k=context,
        softmax_scale=d**-0.5,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        block_table=batch.block_table_RX,
    )

    def in_triton() -> torch.Tensor:
        unified_attention(**common, softcap=0, q_descale=None, k_descale=None, v_descale=None, **segments)
        return out_NHd

    # As in vLLM's backend: batches of up to 128 programs are split over the sequence, 16 ways.
    rows, parts = 128 // K, 16
    segments = dict(
        seq_threshold_3D=rows,
        num_par_softmax_segments=parts,
        softmax_segm_output=torch.empty(rows, H, parts, triton.next_power_of_2(d), dtype=torch.float32),
        softmax_segm_max=torch.empty(rows, H, parts, dtype=torch.float32),
        softmax_segm_expsum=torch.empty(rows, H, parts, dtype=torch.float32),
    )
    found = {TRITON: in_triton}
    if current_platform.is_cuda() and q_NHd.dtype != torch.float32:  # FlashAttention refuses float32
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        version = get_flash_attn_version()
        arguments = common | dict(window_size=list(common["window_size"]), fa_version=version)
        found[f"FlashAttention {version}"] = lambda: flash_attn_varlen_func(**arguments)
    return found


def xformers_attention(
    q_NHd: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, context: int
) -> Contestants:
    """Memory-efficient attention over a copy of the cache without blocks, which is the easier task."""
    if importlib.util.find_spec("xformers") is None or not current_platform.is_cuda():
        return {}
    from xformers.ops import memory_efficient_attention_forward
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask

    N = len(q_NHd)
    bias = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1] * N, context, [context] * N)
    grouped = [
        cache[batch.block_table_RX.long()].flatten(1, 2)[:, :context].flatten(0, 1)[None, :, :, None]
        for cache in (keys, values)
    ]
    k_1NKGd, v_1NKGd = (x.expand(-1, -1, -1, H // K, -1) for x in grouped)
    q_1NKGd = q_NHd.view(1, N, K, H // K, d)
    return {
        "xformers": lambda: memory_efficient_attention_forward(q_1NKGd, k_1NKGd, v_1NKGd, bias, scale=d**-0.5).view(
            N, H, d
        )
    }


def angles(positions: int, dtype: torch.dtype) -> Rotation:
    angles_Pd = torch.arange(positions)[:, None] * 10000.0 ** -(torch.arange(d // 2) / (d // 2))
    return Rotation(torch.cat([angles_Pd.cos(), angles_Pd.sin()], 1).to(dtype))


def cross_attentions(requests: int, context: int, dtype: torch.dtype) -> Contestants:
    """Functions by name that compute the attention of one cross-decoder layer over the global cache: (N, H, d)."""
    keys, values, batch, _ = decodes(requests, context, GLOBAL_BLOCK, 1, dtype)
    q_NHd = torch.randn(requests, H, d, dtype=dtype)
    ours = {"ours": lambda: cross_attention(q_NHd, keys, values, batch, d**-0.5)}
    rows = (q_NHd, keys, values, batch, context)
    return ours | vllm_attention(*rows) | xformers_attention(*rows)


def window_steps(requests: int, context: int, dtype: torch.dtype) -> Contestants:
    """Functions by name from an (iteration, layer)'s projections to its attention (N, H, d), which write its cache."""
    keys, values, batch, slots_N = decodes(requests, context, WINDOW_BLOCK, CACHES_A_BLOCK, dtype)
    qkv_NX = torch.randn(requests, (H + 2 * K) * d, dtype=dtype)
    q_NX, k_NX, v_NX = qkv_NX.split([H * d, K * d, K * d], dim=-1)
    rotation = angles(context, dtype)
    q_norm_d, k_norm_d = torch.rand(2, d).to(dtype)
    positions_N = torch.full((requests,), context - 1)

    def heads(x_NX: torch.Tensor) -> torch.Tensor:
        return x_NX.view(requests, -1, d)

    def ours() -> torch.Tensor:
        cache, step = (keys, values, slots_N, batch), (1, W, d**-0.5, rotation, q_norm_d, k_norm_d)
        return window_step(heads(q_NX), heads(k_NX), heads(v_NX), *cache, *step)

    q_NHd, k_NKd = (torch.empty_like(heads(x_NX), memory_format=torch.contiguous_format) for x_NX in (q_NX, k_NX))
    unscaled = torch.ones(1)

    def eager() -> None:
        ops.rms_norm(q_NHd, heads(q_NX).contiguous(), q_norm_d, 1e-6)
        ops.rms_norm(k_NKd, heads(k_NX).contiguous(), k_norm_d, 1e-6)
        ops.rotary_embedding(positions_N, q_NHd.flatten(1), k_NKd.flatten(1), d, rotation.cos_sin_PD, True)

    def in_torch() -> None:
        for x_NX, norm_d, out_NHd in ((q_NX, q_norm_d, q_NHd), (k_NX, k_norm_d, k_NKd)):
            normed_NHd = torch.nn.functional.rms_norm(heads(x_NX), norm_d.shape, norm_d, 1e-6)
            out_NHd.copy_(turned(rotation, normed_NHd, positions_N))

    def separately(
        name: str, prepare: Callable[[], None], attention: Callable[[], torch.Tensor]
    ) -> Callable[[], torch.Tensor]:
        write = triton_reshape_and_cache_flash if name == TRITON else ops.reshape_and_cache_flash

        def step() -> torch.Tensor:
            prepare()
            write(k_NKd, heads(v_NX), keys, values, slots_N, "auto", unscaled, unscaled)
            return attention()

        return step

    ways = {"vLLM's norm and RoPE": eager}
    if current_platform.is_cuda():  # the engine's default
        ways["compiled norm and RoPE"] = torch.compile(in_torch, dynamic=False)
    theirs = vllm_attention(q_NHd, keys, values, batch, context, window=W)
    return {"ours": ours} | {
        f"{way}, write, {name}": separately(name, prepare, attention)
        for name, attention in theirs.items()
        for way, prepare in ways.items()
    }


def global_writes(requests: int, context: int, dtype: torch.dtype) -> Contestants:
    """Functions by name that norm, rotate and write a step's global KV and return the keys' cache (B, S, K, d)."""
    keys, values, _, slots_N = decodes(requests, context, GLOBAL_BLOCK, 1, dtype)
    k_NKd, v_NKd = torch.randn(2, requests, K, d, dtype=dtype)
    # Each has a cache of its own, so that neither finds what the other wrote.
    their_keys, their_values = torch.cat([keys, values], dim=-1).chunk(2, dim=-1)
    norm_d, normed_NKd, unscaled = torch.rand(d).to(dtype), torch.empty_like(k_NKd), torch.ones(1)
    rotation, positions_N = angles(context, dtype), torch.full((requests,), context - 1)
    unused_NHd = torch.empty(requests, H, d, dtype=dtype)

    def ours() -> torch.Tensor:
        global_write(k_NKd, v_NKd, keys, values, slots_N, norm_d, 1e-6, rotation, positions_N)
        return keys

    def theirs() -> torch.Tensor:
        ops.rms_norm(normed_NKd, k_NKd, norm_d, 1e-6)
        ops.rotary_embedding(positions_N, unused_NHd.flatten(1), normed_NKd.flatten(1), d, rotation.cos_sin_PD, True)
        cache = (their_keys, their_values, slots_N)
        triton_reshape_and_cache_flash(normed_NKd, v_NKd, *cache, "auto", unscaled, unscaled)
        return their_keys

    return {"ours": ours, "vLLM's norm and RoPE, write": theirs}


def times_us(made: list[Contestants]) -> dict[str, list[float]]:
    """Microseconds of a call in each round, by name. A CUDA graph, like a decode step's, has one call on each set."""

    def each(name: str) -> Callable[[], None]:
        calls = [contestants[name] for contestants in made]

        def call() -> None:
            for one in calls:
                one()

        return call

    taken: dict[str, list[float]] = {name: [] for name in made[0]}
    for _ in range(ROUNDS):
        for name, runs in taken.items():
            graph_ms = triton.testing.do_bench_cudagraph(each(name), return_mode="median")
            runs.append(graph_ms * 1e3 / len(made))
    return taken


def compare(
    result: Result, kernel: str, kind: Callable[..., Contestants], contexts: tuple[int, ...], seen: int | None
) -> None:
    """Add the times of a kind's contestants, which read or write `seen` tokens of a context (None: all of them)."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    for requests in BATCHES:
        for context in contexts:
            held, moved = (requests * tokens * K * 2 * d * 2 for tokens in (context, min(context, seen or context)))
            if held > POOL_BYTES:
                continue
            progress(f"{kernel}, {requests} requests, {context} tokens")
            point: dict[str, Key] = dict(kernel=kernel, requests=requests, context=context)
            sets = max(1, min(COLD_BYTES // moved, MOST_SETS, POOL_BYTES // held))
            made = [kind(requests, context, torch.bfloat16) for _ in range(sets)]
            for name, runs in times_us(made).items():
                result.add("call", "us", runs, **point, by=name)
            copies = times_us([{"copy": lambda: target.copy_(source)}])["copy"]
            result.add("bytes", "bytes", moved, **point)
            result.add("copy", "bytes/us", [2 * COPIED_BYTES / us for us in copies], **point)


def measure() -> Result:
    if not torch.cuda.is_available():
        sys.exit("kernels needs a GPU: what Triton's interpreter takes on a CPU says nothing of them.")
    torch.set_default_device("cuda")
    result = Result.here("kernels", heads=H, kv_heads=K, head_dim=d, window=W, dtype="bfloat16", rounds=ROUNDS)
    compare(result, "cross attention", cross_attentions, CONTEXTS, None)
    compare(result, "window step", window_steps, (1 << 10,), W)
    compare(result, "global write", global_writes, (1 << 10,), 1)
    return result


if __name__ == "__main__":
    publish(measure())
