"""KV-cache bytes by the paper's formula: what a request needs, without the rounding to blocks that any pool adds."""

from dataclasses import dataclass

from vllm_yocou.config import YocoUConfig


@dataclass(frozen=True)
class KVBytes:
    """Bytes of KV cache on one tensor-parallel rank.

    Attributes:
        token: of one token in all caches that keep every token.
        window_token: of one token in all caches that keep the last `window` tokens only.
        window: tokens that those keep.
    """

    token: int
    window_token: int = 0
    window: int = 0

    @classmethod
    def yoco_u(
        cls, config: YocoUConfig, element_bytes: int, ranks: int = 1, iterations: int | None = None
    ) -> "KVBytes":
        """One global cache and T·S window caches (arXiv 2604.01220); with one iteration, plain YOCO.

        `element_bytes` of a stored key or value. Ranks share KV heads, or hold a copy where they are more.
        """
        heads, cross_heads = (
            max(1, heads // ranks) for heads in (config.num_key_value_heads, config.cross_num_key_value_heads)
        )
        loops = config.num_iterations if iterations is None else iterations
        return cls(
            token=2 * cross_heads * config.cross_head_dim * element_bytes,
            window_token=2 * heads * config.head_dim * element_bytes * loops * config.num_self_decoder_layers,
            window=config.sliding_window,
        )

    @classmethod
    def transformer(cls, config: YocoUConfig, element_bytes: int, ranks: int = 1) -> "KVBytes":
        """As many layers, each with a cache of its own of every token, in the self-decoder's heads."""
        heads = max(1, config.num_key_value_heads // ranks)
        return cls(token=2 * heads * config.head_dim * element_bytes * config.num_hidden_layers)

    def of_windows(self, tokens: int) -> int:
        return self.window_token * min(tokens, self.window)

    def of_request(self, tokens: int) -> int:
        """Bytes of a request of `tokens` in decode."""
        return self.token * tokens + self.of_windows(tokens)

    def tokens_in(self, budget: int) -> int:
        """The longest request that fits into `budget` bytes."""
        in_window = self.token + self.window_token
        if budget < in_window * self.window:
            return budget // in_window
        return (budget - self.of_windows(self.window)) // self.token
