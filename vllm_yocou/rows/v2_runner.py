"""How vLLM's V2 runner tells the row selection about its requests: a model may bring a `ModelState` of its own."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_yocou.rows.hand_over import row_slots

# Requests that vLLM makes up, to warm up before the first user's, have identifiers that begin like this.
WARM_UPS = ("_warmup_", "_v2_mixed_warmup")


class YocoUModelState(DefaultModelState):
    def __init__(self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: Any, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        (slots,) = row_slots(vllm_config)
        self.requests = slots.requests
        self.requests.fill()

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        # With the tokens generated before a preemption, which the runner computes again as prefill.
        prefill = new_req_data.prefill_token_ids or ()
        warms_up = new_req_data.req_id.startswith(WARM_UPS)
        self.requests.add(req_index, new_req_data.sampling_params, len(prefill), warms_up)
