"""vLLM's worker of a CPU for a batch-invariant engine: a hook is needed where its own worker replaces operators."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_yocou.workarounds import without_overrides_for_gpus


class InvariantWorker(CPUWorker):
    def init_device(self) -> None:
        with without_overrides_for_gpus():
            super().init_device()
