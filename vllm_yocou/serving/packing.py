"""T·S window caches and one global cache share one pool of blocks, and a block is filled to the last byte if it can be.

A block of the pool holds either F window pages, one page of `window_block` tokens for each of F (iteration, layer)
pairs, or one global page of `global_block` tokens, which is as many bytes or a little more. vLLM's scheduler then sees
T·S/F window groups and one global group, so T·S/F + 1 block tables, however often the self-decoder loops.

Nothing here imports torch or vLLM: `vllm-yocou kv` needs neither.
"""

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from vllm_yocou.architecture import Architecture
from vllm_yocou.options import Options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Tokens of the smallest block that vLLM's attention kernels take, by kind of device.
SMALLEST_BLOCK = {"cpu": 32, "cuda": 16}


@dataclass(frozen=True)
class Packing:
    """How the window caches share the pool's blocks with the global cache.

    Attributes:
        window_caches: T·S.
        groups: window groups, each with a block table of its own; the global cache is one more.
        window_block, global_block: tokens of a window page and of the global page.
        window_bytes, global_bytes: of one token in one window cache and in the global cache, on one rank.
    """

    window_caches: int
    groups: int
    window_block: int
    global_block: int
    window_bytes: int
    global_bytes: int

    @classmethod
    def choose(
        cls, window_caches: int, block: int, window_bytes: int, global_bytes: int, max_global_block: int
    ) -> "Packing":
        """The fewest groups whose global block stays within `max_global_block` tokens; one cache a group always works.

        `block` is the smallest that the attention backend takes, in tokens. A prefix-cache hit ends at a multiple of
        the global block, and a shorter prompt never hits: that is what few groups cost.
        """
        for groups in range(1, window_caches + 1):
            page_bytes = ceil(window_caches / groups) * block * window_bytes
            global_block = ceil(page_bytes / (block * global_bytes)) * block
            packing = cls(window_caches, groups, block, global_block, window_bytes, global_bytes)
            if global_block <= max(max_global_block, block):
                break
        return packing

    @classmethod
    def expected(
        cls, config: Architecture, element_bytes: int, ranks: int, block: int, iterations: int | None = None
    ) -> "Packing":
        """How a model's caches will share blocks, for attention kernels whose smallest block has `block` tokens.

        `element_bytes` of a stored key or value; `iterations` other than the model's own T.
        """
        heads, cross_heads = (
            max(1, count // ranks) for count in (config.num_key_value_heads, config.cross_num_key_value_heads)
        )
        return cls.choose(
            window_caches=(iterations or config.num_iterations) * config.num_self_decoder_layers,
            block=block,
            window_bytes=2 * heads * config.head_dim * element_bytes,
            global_bytes=2 * cross_heads * config.cross_head_dim * element_bytes,
            max_global_block=Options().longest_global_block(config.sliding_window),
        )

    @classmethod
    def unwindowed(cls, block: int, token_bytes: int) -> "Packing":
        """Of a model whose layers all keep every token, `token_bytes` of them together."""
        return cls(0, 0, block, block, 0, token_bytes)

    @property
    def layers_per_block(self) -> int:
        """F: window caches in a block, of the fullest group."""
        return ceil(self.window_caches / self.groups)

    @property
    def block_bytes(self) -> int:
        return self.global_block * self.global_bytes

    @property
    def waste(self) -> float:
        """The share of the window groups' blocks that holds nothing: caches or bytes that do not divide."""
        used = self.window_caches * self.window_block * self.window_bytes
        return 1 - used / (self.groups * self.block_bytes)

    def blocks(self, tokens: int, window: int, in_flight: int = 1) -> int:
        """Most blocks that a request of `tokens` holds while its last `in_flight` tokens are computed."""
        held = min(tokens, window - 1 + in_flight)
        pages = min(ceil(tokens / self.window_block), ceil((held - 1) / self.window_block) + 1)
        return self.groups * pages + ceil(tokens / self.global_block)

    def admitted(self, tokens: int, window: int, in_flight: int) -> int:
        """Blocks that vLLM wants to find free before it lets a prompt of `tokens` in: at most a page a group more.

        It does not know where in a page the window begins (`SlidingWindowSpec.max_admission_blocks_per_request`).
        """
        held = min(tokens, window - 1 + in_flight)
        pages = min(ceil(tokens / self.window_block), ceil(held / self.window_block) + 1)
        return self.groups * pages + ceil(tokens / self.global_block)

    def __str__(self) -> str:
        return (
            f"YOCO-U KV cache: {self.window_caches} window caches, {self.layers_per_block} to a block of "
            f"{self.window_block} tokens, and one global cache in blocks of {self.global_block} tokens: "
            f"{self.groups + 1} KV cache groups, {self.waste:.1%} of the window blocks unused."
        )

    def cost(self, vllm_config: "VllmConfig", window: int) -> str:
        """What one request takes, in decode and while its prompt is computed in chunks, in a sentence."""
        tokens, chunk = vllm_config.model_config.max_model_len, vllm_config.scheduler_config.max_num_batched_tokens
        if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            token_bytes = self.window_caches * self.window_bytes + self.global_bytes
            return (
                f"vLLM's hybrid KV cache manager is off, so all {self.window_caches + 1} caches of YOCO-U keep every "
                f"token: a request of {tokens} tokens holds {tokens * token_bytes / 2**20:.1f} MiB a rank."
            )
        decode, prefill = (
            self.blocks(tokens, window, in_flight) * self.block_bytes / 2**20
            for in_flight in (1, vllm_config.max_in_flight_tokens)
        )
        return (
            f"A request of {tokens} tokens holds {decode:.1f} MiB of KV cache a rank in decode and up to {prefill:.1f} "
            f"MiB in prefill, when the window caches also hold all tokens in flight (max_num_batched_tokens {chunk})."
        )

    def prefix_cost(self, window: int) -> str:
        """Where prefix-cache hits end, and the blocks that one needs, in a sentence."""
        if window == 1:
            return "vLLM finds no prefix-cache hits with a window of one token."
        pages = ceil((window - 1) / self.window_block)
        return (
            f"Prefix-cache hits end at multiples of {self.global_block} tokens: a cached prefix takes a block of the "
            f"pool for each {self.global_block} tokens and {self.groups * pages} blocks for its last {window - 1}."
        )
