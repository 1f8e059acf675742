"""A pool holds `together` requests of one length as vLLM schedules them, and `guaranteed` whatever state they are in.

The two differ because a window cache holds the tokens in flight as well: one in a decode, a whole step's in a prefill.
vLLM computes one prefill at a time, or the end of one and the beginning of the next, so that a pool fills with
requests in decode beside one in prefill. The concurrency that vLLM reports at a start charges every request with a
prefill.

Nothing here imports torch or vLLM: `vllm-yocou kv` needs neither.
"""

from dataclasses import dataclass

from vllm_yocou.serving.packing import Packing

# What a step takes at most, unless the user says otherwise. A window cache holds every token in flight, so tokens a
# step are memory a request: with T·S = 36 caches of 512 tokens and 32k tokens of context, 49 MiB in decode become 87 at
# 1024, 339 at 8192, and 1185 (as much as without windows) at 16384 with two steps in flight. On a CPU, chunks of 1024
# prefill as fast as longer ones; on an H100, chunks of 8192 prefill 3.4 times as fast as those of 1024, and longer ones
# no faster (benchmarks/).
CHUNK_ON_CPU = 1024
CHUNK_ON_GPU = 8192


@dataclass(frozen=True)
class Load:
    """Requests of one length, and how vLLM computes them.

    Attributes:
        tokens: of a request, prompt and answer together.
        window: W.
        chunk: tokens of a step at most, of all requests.
        steps: that are in flight at a time; vLLM may schedule one while another is computed.
        decoded: tokens that a request decodes in a step, drafts included.
    """

    tokens: int
    window: int
    chunk: int
    steps: int = 1
    decoded: int = 1

    @classmethod
    def by_default(cls, device: str, tokens: int, window: int, chunk: int | None = None) -> "Load":
        """What a start with no flag but `max_num_batched_tokens` makes of a "cpu" or a "cuda" device."""
        default, steps = (CHUNK_ON_CPU, 1) if device == "cpu" else (CHUNK_ON_GPU, 2)
        return cls(tokens, window, chunk or default, steps)


@dataclass(frozen=True)
class Capacity:
    """How many requests of a `Load` a pool holds at the same time.

    Attributes:
        blocks: of the pool, with the one that vLLM keeps empty.
        together: requests that run side by side, one of them in prefill and the others in decode.
        guaranteed: requests that fit even if all of them are in prefill.
    """

    blocks: int
    together: int
    guaranteed: int

    @classmethod
    def of(cls, packing: Packing, load: Load, blocks: int, spare: int = 0) -> "Capacity":
        """Of a pool of `blocks` in which vLLM admits a request beside others only if `spare` more are free."""
        usable = blocks - 1
        prefill = packing.admitted(load.tokens, load.window, load.steps * load.chunk)
        decode = packing.blocks(load.tokens, load.window, load.steps * load.decoded)
        beside = max(0, usable - spare - prefill) // decode
        return cls(blocks, beside + 1 if usable >= prefill else 0, max(0, usable) // prefill)

    def describe(self, tokens: int, sequences: int) -> str:
        """For the log of an engine that runs at most `sequences` requests of `tokens` tokens."""
        said = f"The KV cache of {self.blocks:,} blocks holds"
        if self.together == 1:
            return f"{said} 1 request of {tokens:,} tokens at a time."
        limit = f", of which max_num_seqs lets {sequences:,} run" if sequences < self.together else ""
        return (
            f"{said} {self.together:,} requests of {tokens:,} tokens at a time, {self.together - 1:,} in decode "
            f"beside 1 in prefill{limit}. If all are in prefill, {self.guaranteed:,} fit: vLLM's maximum concurrency "
            "assumes that."
        )
