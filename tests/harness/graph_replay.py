"""CUDA's piecewise graphs as far as addresses go, on a CPU: a replay reads where the capture read and writes there.

What a graph of vLLM's replays is the same computation over the same memory, whatever the call was given. Here, a replay
is a call with the tensors of the first call, whose results overwrite those of the first call, and no KV connector hears
of it. As on CUDA, all pieces are captured in steps of their own, before the first request, and must not be replayed
there. Streams, memory pools and kernels have no part in it.
"""

from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.forward_context import get_forward_context
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.worker.cpu_worker import CPUWorker

import vllm_yocou.serving.model

SIZES = [1, 2, 4, 8, 16, 32, 37]  # the last is that of a whole chunk


class ReplayedGraph:
    """Takes the place of vLLM's CUDAGraphWrapper."""

    captures = replays = 0
    capturing = False

    def __init__(self, runnable, vllm_config, runtime_mode, cudagraph_options=None):
        self.runnable, self.runtime_mode = runnable, runtime_mode
        self.compilation_config = vllm_config.compilation_config
        self.concrete_cudagraph_entries = {}
        CUDAGraphWrapper._all_instances.add(self)

    def __call__(self, *args):
        context = get_forward_context()
        if context.cudagraph_runtime_mode != self.runtime_mode:
            return self.runnable(*args)
        rows, captured = context.batch_descriptor, self.concrete_cudagraph_entries
        if rows not in captured:
            assert ReplayedGraph.capturing, "vLLM captures in no other step"
            captured[rows] = (args, self.runnable(*args))
            ReplayedGraph.captures += 1
            return captured[rows][1]
        assert not ReplayedGraph.capturing, "a custom all-reduce in this piece would read pointers that are not set yet"
        args, result = captured[rows]
        with patch.object(kv_transfer_state, "_KV_CONNECTOR_AGENT", None):  # a replay runs no hook of Python's
            replayed = self.runnable(*args)
        for kept, fresh in zip(tensors(result), tensors(replayed), strict=True):
            kept.copy_(fresh)
        ReplayedGraph.replays += 1
        return result


def tensors(tree) -> list[torch.Tensor]:
    """A piece may also return the number of rows, which a graph has for good."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def capture_all(runner) -> None:
    """As vLLM's V1 runner does for CUDA, without its streams."""
    for mode, descriptors in runner.cudagraph_dispatcher.get_capture_descs():
        for descriptor in descriptors:
            runner._dummy_run(descriptor.num_tokens, cudagraph_runtime_mode=mode, is_graph_capturing=True)


def install() -> None:
    """Have vLLM compile on this CPU as it does for CUDA, in pieces between attention, with a graph for each piece."""
    check = CpuPlatform.check_and_update_config

    def as_on_cuda(vllm_config):
        check(vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.cudagraph_mode = CompilationMode.VLLM_COMPILE, CUDAGraphMode.PIECEWISE
        compilation.backend = "eager"  # of the pieces; CUDA's Inductor passes name operations that a CPU lacks
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = SIZES, max(SIZES)
        compilation.compile_sizes = []

    warm_up = CPUWorker.compile_or_warm_up_model

    def and_capture(worker):
        times = warm_up(worker)
        ReplayedGraph.capturing = True
        capture_all(worker.model_runner)
        ReplayedGraph.capturing = False
        return times

    CPUWorker.compile_or_warm_up_model = and_capture
    vllm_yocou.serving.model.warmed_up_by_one_pass = lambda vllm_config: False  # as on CUDA
    CpuPlatform.check_and_update_config = staticmethod(as_on_cuda)
    CpuPlatform.get_static_graph_wrapper_cls = staticmethod(lambda: f"{__name__}.{ReplayedGraph.__name__}")
