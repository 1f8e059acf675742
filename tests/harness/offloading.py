"""vLLM's offloading connectors on a CPU, where only their copying between devices is replaced; what they must bring.

HostSpec is an offloading spec from elsewhere, which vLLM's OffloadingConnector takes by name. The simple connector has
no such place: `copy_on_host` replaces what it copies with.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from harness import tiny
from harness.engines import generate, kv_cache_config, metric

HITS = "vllm:external_prefix_cache_hits"
HOST_BYTES = 64 << 20
# Two window groups on a CPU, of three and two caches, and a pool that holds little more than one prompt.
SHAPE = dict(num_iterations=5, num_self_decoder_layers=1, num_hidden_layers=3)
SETTINGS = dict(max_model_len=800, num_gpu_blocks_override=24, additional_config={"yocou": {"max_global_block": 96}})
LONG = [tiny.prompt(700), tiny.prompt(333), tiny.prompt(700, seed=1)]


@dataclass(frozen=True)
class Move:
    """Blocks of one KV cache group that were copied; stored, or loaded."""

    group: int
    blocks: list[int]
    stored: bool


class HostWorker(OffloadingWorker):
    """Copies at once where vLLM's own worker asks a GPU to."""

    def __init__(self, caches: CanonicalKVCaches, chunks: int):
        self.caches = caches
        self.host = [torch.zeros(chunks, cache.page_size_bytes, dtype=torch.int8) for cache in caches.tensors]
        self.moves: list[Move] = []
        self.finished: list[TransferResult] = []

    def submit_store(self, job_id, src_spec, dst_spec, **rest) -> bool:
        return self.copy(job_id, src_spec, dst_spec, stored=True)

    def submit_load(self, job_id, src_spec, dst_spec, **rest) -> bool:
        return self.copy(job_id, dst_spec, src_spec, stored=False)

    def copy(self, job_id: int, ours: GPULoadStoreSpec, theirs, stored: bool) -> bool:
        start = 0
        for group, size in enumerate(ours.group_sizes):
            here = ours.block_ids[start : start + size].tolist()
            there = theirs.block_ids[start : start + size].tolist()
            start += size
            for reference in self.caches.group_data_refs[group]:
                cache, host = self.caches.tensors[reference.tensor_idx].tensor, self.host[reference.tensor_idx]
                if stored:
                    host[there] = cache[here]
                else:
                    cache[here] = host[there]
            self.moves.append(Move(group, here, stored))
        self.finished.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self.finished = self.finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        pass


class HostSpec(CPUOffloadingSpec):
    def get_worker(self, kv_caches: CanonicalKVCaches) -> HostWorker:
        self._worker = self._worker or HostWorker(kv_caches, self.num_chunks)
        return self._worker


NATIVE = dict(
    kv_connector="OffloadingConnector",
    kv_role="kv_both",
    kv_connector_extra_config=dict(cpu_bytes_to_use=HOST_BYTES, spec_name="HostSpec", spec_module_path=__name__),
)
SIMPLE = dict(
    kv_connector="SimpleCPUOffloadConnector",
    kv_role="kv_both",
    kv_connector_extra_config=dict(cpu_bytes_to_use=HOST_BYTES),
)
MULTI = dict(
    kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config=dict(connectors=[NATIVE, SIMPLE])
)


class Done:
    """An event or a stream of something that has always happened already."""

    def __init__(self, priority: int = 0):
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def record(self, stream) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class HostCopies:
    """In the place of the simple connector's DmaCopyBackend."""

    def init(self, device_caches, host_caches, *rest) -> None:
        self.device_caches, self.host_caches = device_caches, host_caches

    def launch_copy(self, src_blocks, dst_blocks, is_store, event_idx, events_list, wait_event=None) -> None:
        sides = self.device_caches, self.host_caches
        sources, targets = sides if is_store else sides[::-1]
        for name, source in sources.items():
            targets[name][dst_blocks] = source[src_blocks]
        events_list.append((event_idx, Done()))

    def shutdown(self) -> None:
        pass


def copy_on_host(monkeypatch) -> None:
    from vllm.v1.simple_kv_offload import worker

    class Torch:
        cuda = SimpleNamespace(Stream=Done, current_stream=lambda: None)
        Event = Done

        def __getattr__(self, name: str):
            return getattr(torch, name)

    monkeypatch.setattr(worker, "torch", Torch())
    monkeypatch.setattr(worker, "DmaCopyBackend", HostCopies)


def global_block(llm) -> int:
    return max(group.kv_cache_spec.block_size for group in kv_cache_config(llm).kv_cache_groups)


def ask_again(llm) -> list[tuple[list[int], Any]]:
    """Ask long prompts one by one, so that each takes the others' blocks, and again, when each finds its own outside.

    Returns:
        Prompts and what came of them, to be compared with the reference.
    """
    answered = []
    for again in (False, True):
        for prompt in LONG:
            before = metric(llm, HITS)
            (output,) = generate(llm, [prompt], tokens=20)
            answered.append((prompt, output))
            found, block = metric(llm, HITS) - before, global_block(llm)
            assert output.num_cached_tokens == ((len(prompt) - 1) // block * block if again else 0)
            assert (found > 0) == again
    return answered
