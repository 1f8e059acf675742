"""Engines of one runner, one after the other, for jobs that come as lines of JSON: the child of harness/runners.py.

    python -m harness.engine_process RUNNER

A job is {"checkpoint": FOLDER, "settings": {...}, "batches": [[{"prompt": [...], "sampling": {...}, "adapter":
FOLDER, "aborted_after": STEPS}]], "calls": [[[METHOD, {...}]]]}, with settings of vLLM's `LLM`; of a request, all but
the prompt may be left out, and one that is aborted has no output. The calls of a batch go to the workers before it,
null for none of any batch. Its answer is one line on standard output,
{"batches": [...]} or {"error": TRACEBACK}; everything that vLLM prints goes to standard error. The process ends where
its input does, or by SIGALRM when a job takes longer than JOB_S.

RUNNER is one of these:
- v1. Its forward passes are eager, and read no tensor's values on the host (host_reads.py).
- v1-breakable: the model is captured in graphs that break, as with VLLM_USE_BREAKABLE_CUDAGRAPH=1 on CUDA
  (recorded_graphs.py).
- v1-graphs: the model is compiled in pieces that replay the addresses of their first call, as CUDA graphs do
  (graph_replay.py).
- v2: vLLM's V2 runner, CUDA's default. It needs Triton, for which the CPU build has no backend; here its kernels run in
  Triton's interpreter, on the CPU and with the same results.
- v2-triton: attention itself, too, is CUDA's Triton backend. That is slow, so it suits a few tokens only.
- two-ranks: V1 on two workers, which are forked from a process that has imported vLLM already.
- data-rank: V1 as one of the data-parallel ranks that data_ranks.py starts for a job with "ranks": a list of batches
  for each rank in the place of "batches", and a list of answers as its answer. Such jobs of v1-graphs and v2 start
  ranks of these.
"""

import gc
import json
import os
import signal
import sys
import traceback
from collections import Counter
from contextlib import contextmanager
from itertools import count
from unittest.mock import patch

from harness import data_ranks, host_reads, interpreter

METRICS = (
    "yocou_self_decoder_rows",
    "yocou_cross_decoder_rows",
    "yocou_skipped_rows",
    "num_preemptions",
    "spec_decode_num_accepted_tokens",
)
DEFAULTS = dict(
    skip_tokenizer_init=True,
    dtype="float32",
    max_model_len=512,
    max_num_batched_tokens=37,
    max_num_seqs=8,
    kv_cache_memory_bytes=32 << 20,
    disable_log_stats=False,
    compilation_config={"mode": 0},
    kernel_config={"enable_jit_warmup": False},  # Triton's interpreter does not take vLLM 0.33's warm-up of its kernels
)
TWO_RANKS = dict(tensor_parallel_size=2, disable_custom_all_reduce=True)
GREEDY = dict(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5, detokenize=False)
JOB_S = 300


def plain_output(output) -> dict:
    """What harness/runners.py makes a RequestOutput of again."""

    def plain(rows) -> list | None:
        return rows and [row and {token: entry.logprob for token, entry in row.items()} for row in rows]

    return {
        "completions": [
            {
                "token_ids": list(completion.token_ids),
                "logprobs": plain(completion.logprobs),
                "finish_reason": completion.finish_reason,
            }
            for completion in output.outputs
        ],
        "prompt_logprobs": plain(output.prompt_logprobs),
        "num_cached_tokens": output.num_cached_tokens,
    }


def attend_in_triton() -> None:
    """Give YOCO-U's caches CUDA's Triton attention; vLLM's CPU platform has only one answer."""
    import torch
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    import vllm_yocou.serving.backend

    vllm_yocou.serving.backend.get_attn_backend = lambda *args, **kwargs: TritonAttentionBackend
    torch.cuda.get_device_capability = lambda *args: (9, 0)  # asked for by its cache writer, to choose a block


def fork_workers() -> None:
    """Let workers inherit the modules that each would otherwise import for itself, for ten seconds of a core."""
    from multiprocessing import get_context

    import vllm.v1.executor.multiproc_executor as executor

    context = get_context("forkserver")
    # The server of the forks starts with the first worker, and so in the environment that vLLM has prepared for it.
    context.set_forkserver_preload(["vllm.v1.worker.cpu_worker", "vllm_yocou.serving.model"])
    executor.get_mp_context = lambda: context


def counted_kernels() -> Counter:
    """Calls of each of the plugin's kernels."""
    import vllm_yocou.serving.fused_attention as fused

    calls = Counter()

    def counted(name: str):
        kernel = getattr(fused, name)

        def call(*args, **kwargs):
            calls[name] += 1
            return kernel(*args, **kwargs)

        return call

    for name in ("window_step", "global_write", "cross_attention"):
        setattr(fused, name, counted(name))
    return calls


@contextmanager
def aborting(llm, batch: list[dict]):
    """Abort each request of the batch that is to be, once the engine has made so many steps."""
    engine, first, step, made = llm.llm_engine, llm.request_counter.counter, llm.llm_engine.step, count(1)

    def step_and_abort() -> list:
        outputs, steps = step(), next(made)
        engine.abort_request([str(first + i) for i, one in enumerate(batch) if one.get("aborted_after") == steps])
        return outputs

    with patch.object(engine, "step", step_and_abort):
        yield


def counted_calls() -> Counter:
    """Calls of the cross-decoder, and the rows in them, read or not."""
    from vllm_yocou.serving.model import CrossDecoder

    calls, call = Counter(), CrossDecoder.__call__

    def counted(self, positions_M, *args):
        calls["cross_decoder_calls"] += 1
        calls["cross_decoder_called_rows"] += len(positions_M)
        return call(self, positions_M, *args)

    CrossDecoder.__call__ = counted
    return calls


class RunnerEngines:
    """Starts engines of a runner and asks them; what it changes in vLLM stays for the life of the process."""

    def __init__(self, runner: str):
        self.runner, self.v2 = runner, runner.startswith("v2")
        self.settings = DEFAULTS | (TWO_RANKS if runner.startswith("two-ranks") else {})
        # First: importing vLLM looks for Triton, once.
        if self.v2:
            interpreter.install()
        if runner == "v2-triton":
            attend_in_triton()
        self.kernels = counted_kernels() if runner == "v2-triton" else Counter()
        from harness import graph_replay

        self.graphs: type = graph_replay.ReplayedGraph
        if runner == "v1-graphs":
            graph_replay.install()
        if runner == "v1-breakable":
            from harness import recorded_graphs

            self.graphs = recorded_graphs.RecordedGraph
            recorded_graphs.install()
        if runner.startswith("two-ranks"):
            fork_workers()
        from harness.engines import know_the_model_class, override_kernels_once

        know_the_model_class()
        override_kernels_once()
        self.calls = counted_calls()
        if runner == "v1":
            host_reads.refuse_in_forward_passes()

    def answer(self, job: dict) -> dict:
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        if "ranks" in job:
            return data_ranks.answer(self.runner, job)
        llm = None
        try:
            llm = LLM(job["checkpoint"], **self.settings | job["settings"])
            assert llm.llm_engine.vllm_config.use_v2_model_runner == self.v2
            return {"batches": self.generated(llm, job["batches"], job["calls"])}
        except Exception:
            return {"error": traceback.format_exc()}
        finally:
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()

    def generated(self, llm, batches: list[list[dict]], calls: list[list]) -> list[dict]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        ids: dict[str, int] = {}

        def adapter(folder: str) -> LoRARequest:
            return LoRARequest(folder, ids.setdefault(folder, len(ids) + 1), folder)

        result, before = [], self.metrics(llm)
        for number, batch in enumerate(batches):
            refusals = []
            for method, arguments in calls[number] if calls else ():
                try:
                    llm.collective_rpc(method, kwargs=arguments)
                except Exception as error:
                    refusals.append(str(error))
            prompts = [{"prompt_token_ids": request["prompt"]} for request in batch]
            parameters = [SamplingParams(**GREEDY | request.get("sampling", {})) for request in batch]
            adapters = [adapter(request["adapter"]) if request.get("adapter") else None for request in batch]
            with aborting(llm, batch):
                outputs = llm.generate(prompts, parameters, use_tqdm=False, lora_request=adapters)
            after = self.metrics(llm)
            moved = {name: after[name] - before[name] for name in after}
            plain = [plain_output(output) for output in outputs]
            result.append({"outputs": plain, "metrics": moved, "refusals": refusals})
            before = after
        return result

    def metrics(self, llm) -> dict[str, int]:
        """Sums over all engines that the process has had: vLLM's registry and the counters are the process's."""
        found = llm.get_metrics()
        counted = {name: sum(entry.value for entry in found if entry.name == f"vllm:{name}") for name in METRICS}
        kernels = {name: self.kernels[name] for name in ("window_step", "global_write", "cross_attention")}
        calls = {name: self.calls[name] for name in ("cross_decoder_calls", "cross_decoder_called_rows")}
        graphs = {"graph_captures": self.graphs.captures, "graph_replays": self.graphs.replays}
        if connector := sys.modules.get("harness.kv_connector"):
            calls |= connector.counts()
        return counted | kernels | calls | graphs


def main() -> None:
    (runner,) = sys.argv[1:]
    # Standard output is for answers; what vLLM and its workers print goes where the errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engines = RunnerEngines(runner)
    for line in sys.stdin:
        signal.alarm(JOB_S)
        print(json.dumps(engines.answer(json.loads(line))), file=answers, flush=True)
        signal.alarm(0)


if __name__ == "__main__":
    main()
