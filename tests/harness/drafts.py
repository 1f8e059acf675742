"""A class that drafts, as users write them for vLLM's speculation by `custom_class`."""

import numpy as np


class AfterTheLastToken:
    """Drafts what has followed the newest token where it stood before, and nothing where it is new."""

    def __init__(self, vllm_config):
        self.length = vllm_config.speculative_config.num_speculative_tokens

    def load_model(self, model) -> None:
        """vLLM asks for it; there are no weights."""

    def propose(self, sampled: list[list[int]], lengths: np.ndarray, tokens: np.ndarray, **_) -> list[list[int]]:
        """
        Args:
            sampled: this step's new tokens by request, none where a prompt goes on.
            lengths: tokens by request, the new ones included.
            tokens: [requests, longest], what the requests consist of.
        """
        requests = zip(sampled, lengths, tokens, strict=False)  # the arrays have rows for more requests
        return [self.after(row[:length].tolist()) if new else [] for new, length, row in requests]

    def after(self, tokens: list[int]) -> list[int]:
        *earlier, newest = tokens
        if newest not in earlier:
            return []
        place = len(earlier) - 1 - earlier[::-1].index(newest)
        return tokens[place + 1 : place + 1 + self.length]
