"""The reference model's KV cache: what generate() fills, rolls back and reorders.

Shapes: B sequences, N tokens of this call, L keys (cached and of this call), K key/value heads of size d.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from vllm_yocou.config import YocoUConfig


class WindowCacheLayer(DynamicSlidingWindowLayer):
    """KV cache of one (iteration, layer): the last W - 1 tokens. transformers' own keeps everything at W = 1.

    After `activate_past_recording` it holds more until `crop`, so that tokens can be removed again.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values (B, K, N, d); return those that this call attends to, (B, K, L, d) each."""
        keys_BKLd, values_BKLd = super().update(key_states, value_states, *args, **kwargs)
        if self.sliding_window == 1:
            self.keys, self.values = keys_BKLd[:, :, :0], values_BKLd[:, :, :0]
        return keys_BKLd, values_BKLd

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, then all that lie outside the window of the next one.

        transformers' own counts on a recorded past that reaches back far enough, and cuts a shorter one too short.

        Raises:
            ValueError: the window of the next token is not held.
        """
        assert self.keys is not None and self.values is not None, "a cache crops its layers only if it holds tokens"
        removed, seen = -tokens_to_remove, self.cumulative_length
        kept = min(seen - removed, self.sliding_window - 1)
        end = self.keys.shape[2] - removed
        if kept > max(end, 0):
            raise ValueError(
                f"{removed} of {seen} tokens cannot be removed from this cache: its windows have dropped what the next "
                "token would see, call activate_past_recording() before the forward passes that may be undone."
            )
        held = slice(end - kept, end) if kept else slice(0)
        self.keys, self.values = self.keys[:, :, held], self.values[:, :, held]
        self.cumulative_length = seen - removed


class YocoUCache(Cache):
    """T·S window caches, iteration-major (entry t·S + i), followed by the one global cache (entry T·S)."""

    def __init__(self, config: YocoUConfig):
        windows = config.num_iterations * config.num_self_decoder_layers
        super().__init__(layers=[*(WindowCacheLayer(config.sliding_window) for _ in range(windows)), DynamicLayer()])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens. As in transformers, a positive number is the length to keep.

        Raises:
            ValueError: the window caches no longer hold what the next token sees; nothing is removed then.
        """
        seen = self.get_seq_length()
        removed = max(seen - tokens_to_remove, 0) if tokens_to_remove > 0 else min(-tokens_to_remove, seen)
        if seen:
            super().crop(-removed)
