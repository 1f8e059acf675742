"""How vLLM's V1 runner tells the row selection about its requests: through the interface of custom logits processors.

A logits processor is told of every change of the batch, with the requests' sampling parameters, before the forward
pass of the step, and sees each request's parameters before the engine does. This one looks, refuses what the runner
would die of, and leaves the logits alone. The engine config names it, for YOCO-U models on the V1 runner only: the V2
runner refuses such classes.
"""

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingType
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from vllm_yocou.rows.selection import RequestTable

NAME = f"{__name__}:RequestObserver"


class RequestObserver(LogitsProcessor):
    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        # Where a chunk does not end its prompt the V1 runner turns the request's generator back, which CPU generators
        # cannot do: the engine would end, and every other request with it.
        if sampling_params.sampling_type is SamplingType.RANDOM_SEED and current_platform.is_cpu():
            raise VLLMValidationError(
                "seed cannot be used with YOCO-U on vLLM's CPU runner: a prompt computed in chunks would end the "
                "engine, leave it out or set temperature to 0.",
                parameter="seed",
                value=sampling_params.seed,
            )

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
            table.filled = True
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
