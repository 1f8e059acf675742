"""CUDA's breakable graphs on a CPU: what is captured between two breaks is recorded, and replayed without Python.

In a step that captures, every operation between breaks is noted with its tensors; a replay computes the same operations
over the same memory. So whatever Python decided in that step stays decided, as on CUDA, and only what vLLM runs eagerly
between graphs sees the step that it is called in. Streams, memory pools and kernels have no part in it.
"""

from contextlib import nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.compilation import breakable_cudagraph
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

import vllm_yocou.serving.model
from harness.graph_replay import SIZES, capture_all, tensors
from vllm_yocou.serving import caches

# Operators of ours in which a graph breaks: not they are captured, but what they do.
BREAKING = {"vllm::yocou_attend_windows": caches.attend_windows, "vllm::yocou_attend_global": caches.attend_global}


class Recorder(TorchDispatchMode):
    graph: "RecordedGraph | None" = None  # that captures now

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if breaking := BREAKING.get(operation.name().partition(".")[0]):
            with self:
                return breaking(*args, **kwargs)
        result = operation(*args, **kwargs)
        if Recorder.graph is not None:
            Recorder.graph.operations.append((operation, args, kwargs, result))
        return result


class RecordedGraph:
    """Takes the place of torch.cuda.CUDAGraph."""

    captures = replays = 0

    def __init__(self):
        self.operations: list[tuple] = []

    def capture_begin(self, **options):
        assert Recorder.graph is None
        Recorder.graph = self

    def capture_end(self):
        assert Recorder.graph is self
        Recorder.graph = None
        RecordedGraph.captures += 1

    def replay(self):
        for operation, args, kwargs, result in self.operations:
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            again = operation(*args, **kwargs)
            for kept, fresh in zip(tensors(result), tensors(again), strict=True):
                if kept.untyped_storage().data_ptr() not in given:  # a view, or written in place
                    kept.copy_(fresh)
        RecordedGraph.replays += 1


def install() -> None:
    """Have vLLM run on this CPU as it does on CUDA with VLLM_USE_BREAKABLE_CUDAGRAPH=1."""
    assert breakable_cudagraph.is_breakable_cudagraph_enabled()
    check, warm_up = CpuPlatform.check_and_update_config, CPUWorker.compile_or_warm_up_model
    load = CPUModelRunner.load_model
    capture = breakable_cudagraph.BreakableCUDAGraphWrapper._capture

    def as_on_cuda(vllm_config):
        check(vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.cudagraph_mode = CompilationMode.NONE, CUDAGraphMode.PIECEWISE
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, max(SIZES)

    def and_capture(worker):
        times = warm_up(worker)
        capture_all(worker.model_runner)
        return times

    def load_and_wrap(runner, *args, **kwargs):
        """As vLLM's runner does on CUDA."""
        load(runner, *args, **kwargs)
        runner.model = breakable_cudagraph.BreakableCUDAGraphWrapper(
            runner.model, runner.vllm_config, runtime_mode=CUDAGraphMode.PIECEWISE
        )

    def recorded(*args):
        with Recorder():
            return capture(*args)

    torch.cuda.CUDAGraph = RecordedGraph
    torch.accelerator.empty_cache = lambda: None
    breakable_cudagraph.capture_pool = lambda *args: nullcontext()
    CpuPlatform.get_global_graph_pool = lambda platform: None
    breakable_cudagraph.weak_ref_tensor = breakable_cudagraph.weak_ref_tensors = lambda tensor: tensor
    breakable_cudagraph.BreakableCUDAGraphWrapper._capture = recorded
    CPUModelRunner.load_model = load_and_wrap
    CPUWorker.compile_or_warm_up_model = and_capture
    CpuPlatform.check_and_update_config = staticmethod(as_on_cuda)
    vllm_yocou.serving.model.warmed_up_by_one_pass = lambda vllm_config: False  # as on CUDA
