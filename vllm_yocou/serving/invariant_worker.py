"""vLLM's worker of a CPU, for an engine that is batch invariant."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_yocou.workarounds import without_overrides_for_gpus


class InvariantWorker(CPUWorker):
    def init_device(self) -> None:
        with without_overrides_for_gpus():
            super().init_device()
