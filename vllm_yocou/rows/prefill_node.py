"""On a prefill node no row runs through the cross-decoder for a token that nobody reads: a placeholder is sampled.

A prefill node computes caches for another engine. That engine computes the last token of the prompt again, over the
caches that it was sent, and samples there. So a request for one token, which is what a router asks a prefill node for,
needs the self-decoder alone. Where its last chunk is a single token, vLLM treats it as a decode: its row runs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

# What may keep the placeholder from being sampled.
STEERING = ("allowed_token_ids", "bad_words", "logit_bias", "structured_outputs")
# Far above the logits of the rows left out, which are zero, so that sampling finds no other token.
LOGIT = 100.0


@dataclass(frozen=True)
class PrefillNode:
    """What an engine that only computes caches answers.

    Attributes:
        placeholder: the token. It never ends a text: after a text that has ended, vLLM's connectors send nothing.
    """

    placeholder: int

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "PrefillNode | None":
        """None for an engine whose answers somebody reads."""
        transfer, model_config = vllm_config.kv_transfer_config, vllm_config.model_config
        if transfer is None or transfer.kv_role != "kv_producer" or model_config.runner_type == "pooling":
            return None
        ends: set[int] = set()
        for eos in (model_config.hf_config.eos_token_id, model_config.try_get_generation_config().get("eos_token_id")):
            ends.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
        return cls(next(token for token in range(len(ends) + 1) if token not in ends))

    def answers(self, params: "SamplingParams | None") -> bool:
        """Whether the placeholder is all that a request gets: nothing is asked that would tell, or sample another."""
        return (
            params is not None
            and params.max_tokens == 1
            and params.logprobs is None
            and params.logprob_token_ids is None
            and self.placeholder not in params.all_stop_token_ids
            and not any(getattr(params, name) for name in STEERING)
        )

    def put(self, logits_RV: torch.Tensor, hidden_RD: torch.Tensor) -> None:
        """Write the placeholder over the logits of rows that did not run, whose hidden states are zero."""
        ran_R = hidden_RD.any(-1)
        logits_RV[:, self.placeholder] = torch.where(ran_R, logits_RV[:, self.placeholder], LOGIT)
