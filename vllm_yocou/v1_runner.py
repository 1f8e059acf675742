"""How vLLM's V1 runner tells the row selection about its requests: through the interface of custom logits processors.

A logits processor is told of every change of the batch, with the requests' sampling parameters, before the forward
pass of the step. This one looks and leaves the logits alone. The engine config names it, for YOCO-U models on the V1
runner only: the V2 runner refuses such classes.
"""

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from vllm_yocou.row_selection import RequestTable

NAME = f"{__name__}:RequestObserver"


class RequestObserver(LogitsProcessor):
    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        self.vllm_config = vllm_config

    def tables(self) -> list[RequestTable]:
        # The runner builds its logits processors before its model.
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return [layer.requests for layer in layers if hasattr(layer, "requests")]

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for table in self.tables():
            table.kept = True
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
