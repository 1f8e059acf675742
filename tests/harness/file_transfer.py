"""Parts of checkpoints for running engines, by way of files: vLLM's own transfers want CUDA.

FileTransfer has the life cycle of vLLM's NCCL and IPC engines. PartReceiver is what TRL and OpenRLHF add to a worker.
"""

from dataclasses import dataclass

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "files"
SETTINGS = {"weight_transfer_config": {"backend": BACKEND}}


def read(file: str, names: list[str]) -> list[tuple[str, torch.Tensor]]:
    with safe_open(file, "pt") as tensors:
        return [(name, tensors.get_tensor(name)) for name in names]


@dataclass
class Part(WeightTransferUpdateInfo):
    file: str
    names: list[str]


class FileTransfer(WeightTransferEngine[WeightTransferInitInfo, Part]):
    init_info_cls = WeightTransferInitInfo
    update_info_cls = Part

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Part) -> None:
        self.model.load_weights(read(update_info.file, update_info.names))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class PartReceiver:
    """For `worker_extension_cls`."""

    def receive_part(self, file: str, names: list[str]) -> list[str]:
        return sorted(self.model_runner.get_model().load_weights(read(file, names)))


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileTransfer)
