"""Send weights to a vLLM engine on the same machine in buckets of a shared file: a weight transfer that needs no GPU.

vLLM's own transfers (`nccl`, `ipc` and their kin) move tensors between GPUs. This one is registered beside them, by
vLLM's factories and under the name of BACKEND, for the trainer as well as for the engine. The trainer packs tensors
into a file that both processes map, tells the engine which tensors the file holds, and fills it again for the next
bucket. Names and sizes are plain JSON, so that the engine can also be a server: vLLM's HTTPVLLMWeightSyncClient takes
the place of OfflineClient, and the server registers the backend where it imports this module
(`--worker-extension-cls bucket_transfer.Registered`).
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self, cast

import torch
from vllm import LLM
from vllm.distributed.weight_transfer.base import (
    ModuleSource,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

BACKEND = "buckets"


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """What the engine must know of a file's bytes: tensors one after the other, without gaps."""

    file: str
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    sizes: list[int]  # in bytes


def mapped(file: str, size: int) -> torch.Tensor:
    """The first `size` bytes of a file, which grows where it is shorter, as memory that processes share; uint8."""
    return torch.from_file(file, shared=True, size=size, dtype=torch.uint8)


class BucketReceiver(WeightTransferEngine[WeightTransferInitInfo, Bucket]):
    """The engine's side, in each of its workers. It has the life cycle of vLLM's NCCL and IPC engines."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = Bucket

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        dtypes = [getattr(torch, dtype) for dtype in update_info.dtypes]
        packed = mapped(update_info.file, sum(update_info.sizes))
        # The tensors are views of memory that the trainer fills again: the model copies what it keeps.
        cast(Any, self.model).load_weights(
            unpack_tensor(packed, update_info.names, update_info.shapes, dtypes, update_info.sizes)
        )

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


@dataclass
class BucketInit(TrainerInitInfo):
    """`rank` is the trainer's. A bucket ends with the tensor that makes it larger than `bucket_bytes`."""

    backend: ClassVar[str] = BACKEND
    bucket_bytes: int = 4 << 20


class BucketSender(TrainerWeightTransferEngine[BucketInit]):
    """The trainer's side, for one rank that holds the whole model."""

    init_info_cls = BucketInit
    bucket_bytes: int

    @classmethod
    def trainer_init(cls, init_info: BucketInit, *, client: VLLMWeightSyncClient, source: Any = None) -> Self:
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        sender.bucket_bytes = init_info.bucket_bytes
        client.init_weight_transfer_engine({})
        return sender

    def send_weights(self) -> None:
        weights = pairs(self.source)
        self.client.start_weight_update()
        with tempfile.NamedTemporaryFile() as file:
            while chunk := pack_tensors(weights, lambda pair: pair[1].detach().cpu(), self.bucket_bytes):
                mapped(file.name, chunk.packed_tensor.numel()).copy_(chunk.packed_tensor)
                dtypes = [str(dtype).removeprefix("torch.") for dtype in chunk.dtypes]
                bucket = Bucket(file.name, chunk.names, chunk.shapes, dtypes, chunk.tensor_sizes)
                self.client.update_weights(asdict(bucket))
        self.client.finish_weight_update()


def pairs(source: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a WeightSource, which vLLM iterates by another name from 0.33 on."""
    return source.iter_full() if hasattr(source, "iter_full") else iter(source)


class OfflineClient:
    """vLLM's VLLMWeightSyncClient for an `LLM` of this program; vLLM has those for HTTP and Ray."""

    def __init__(self, llm: LLM):
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)


class Registered:
    """For --worker-extension-cls: vLLM imports this module in the worker, before it makes the engine's side."""


def sender(model: torch.nn.Module, client: VLLMWeightSyncClient, **settings: Any) -> TrainerWeightTransferEngine:
    """What sends all parameters of `model` each time; `settings` are those of BucketInit."""
    return WeightTransferTrainerFactory.trainer_init(
        BucketInit(rank=0, **settings), client=client, source=ModuleSource(model)
    )


def renew(sender: TrainerWeightTransferEngine, llm: LLM, version: str) -> None:
    """Serve the trainer's weights, which outputs call `version`, and forget all keys and values of older weights.

    Requests under way go on with the new weights, which compute the keys and values of their tokens anew.
    """
    sender.send_weights()
    llm.update_weight_version(version)
    llm.reset_prefix_cache(reset_running_requests=True)


WeightTransferEngineFactory.register_engine(BACKEND, BucketReceiver)
WeightTransferTrainerFactory.register_engine(BACKEND, BucketSender)
