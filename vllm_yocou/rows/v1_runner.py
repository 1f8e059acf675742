"""How vLLM's V1 runner tells the row selection about its requests: through the interface of custom logits processors.

A logits processor is told of every change of the batch, with the requests' sampling parameters, before the forward
pass of the step, and sees each request's parameters before the engine does. This one only observes: it rejects requests
that would crash the runner and never changes logits. The engine settings name it, for YOCO-U models on the V1 runner
only: the V2 runner refuses such classes.
"""

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from vllm_yocou.rows.hand_over import row_slots
from vllm_yocou.workarounds import refuse_seed

NAME = f"{__name__}:RequestObserver"


class RequestObserver(LogitsProcessor):
    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        refuse_seed(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.vllm_config = vllm_config

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        # Looked up in every step: the runner builds its logits processors before its model.
        for table in (slots.requests for slots in row_slots(self.vllm_config)):
            table.fill()
            # The indices of removed requests are free until an addition or a move takes them.
            for index, params, prompt_token_ids, _ in batch_update.added:
                table.add(index, params, len(prompt_token_ids or ()))
            for one, other, direction in batch_update.moved:
                if direction is MoveDirectionality.SWAP:
                    table.swap(one, other)
                else:
                    table.move(one, other)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True
