"""Run a checkpoint in a process of its own and print what it generated: other ranks, other runners.

    python -m harness.engine_process CHECKPOINT RUNNER < job.json

The job is {"settings": {...}, "batches": [[{"prompt": [...], "sampling": {...}, "adapter": "FOLDER"}]]}, with settings
of vLLM's `LLM`; sampling and adapter may be left out.
`RUNNER` is v1, v1-graphs, v2 or v2-triton. With v1-graphs the model is compiled in pieces that replay the addresses of
their first call, as CUDA graphs do (graph_replay.py). vLLM's V2 runner is CUDA's default and wants Triton, of which the
CPU build has no backend; here its kernels run in Triton's interpreter, on the CPU and with the same results. With
v2-triton attention itself, too, is CUDA's Triton backend: slow, so for a few tokens only.
"""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

from harness import interpreter
from harness.checkout import ROOT

# Settings of `run`: one core for each rank; vLLM would give all cores to the first.
TWO_RANKS = dict(
    environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, tensor_parallel_size=2, disable_custom_all_reduce=True
)
METRICS = ("yocou_self_decoder_rows", "yocou_cross_decoder_rows", "yocou_skipped_rows", "num_preemptions")


@dataclass
class Batch:
    """One call of `LLM.generate`: its outputs as vLLM gives them, and how far each metric moved."""

    outputs: list
    metrics: dict[str, int]


def run(checkpoint, batches: list[list[dict]], runner: str = "v1", environment: dict | None = None, **settings):
    """Start the process, return a list of `Batch`."""
    from benchmarks.server import user_environment

    process = subprocess.run(
        [sys.executable, "-m", __name__, str(checkpoint), runner],
        input=json.dumps({"settings": settings, "batches": batches}),
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
        env=user_environment() | (environment or {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    (line,) = (line for line in process.stdout.splitlines() if line.startswith("RESULT "))
    return [
        Batch([request_output(output) for output in batch["outputs"]], batch["metrics"])
        for batch in json.loads(line.removeprefix("RESULT "))
    ]


def request_output(plain: dict) -> SimpleNamespace:
    """vLLM's shape again, from JSON."""

    def logprobs(rows: list | None) -> list | None:
        return rows and [row and {int(token): SimpleNamespace(logprob=p) for token, p in row.items()} for row in rows]

    completions = [
        SimpleNamespace(token_ids=completion["token_ids"], logprobs=logprobs(completion["logprobs"]))
        for completion in plain["completions"]
    ]
    return SimpleNamespace(
        outputs=completions,
        prompt_logprobs=logprobs(plain["prompt_logprobs"]),
        num_cached_tokens=plain["num_cached_tokens"],
    )


def plain_output(output) -> dict:
    def plain(rows) -> list | None:
        return rows and [row and {token: entry.logprob for token, entry in row.items()} for row in rows]

    return {
        "completions": [
            {"token_ids": list(completion.token_ids), "logprobs": plain(completion.logprobs)}
            for completion in output.outputs
        ],
        "prompt_logprobs": plain(output.prompt_logprobs),
        "num_cached_tokens": output.num_cached_tokens,
    }


def interpret_triton() -> None:
    """Let vLLM find a CPU backend in Triton: its interpreter."""
    interpreter.install()
    import triton.backends

    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def attend_in_triton() -> None:
    """Give YOCO-U's caches CUDA's Triton attention; vLLM's CPU platform has only one answer."""
    import torch
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    import vllm_yocou.serving.caches

    vllm_yocou.serving.caches.get_attn_backend = lambda *args, **kwargs: TritonAttentionBackend
    torch.cuda.get_device_capability = lambda *args: (9, 0)  # asked for by its cache writer, to choose a block


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


def main() -> None:
    checkpoint, runner = sys.argv[1:]
    if runner.startswith("v2"):
        interpret_triton()
    if runner == "v2-triton":
        attend_in_triton()
    kernels = counted_kernels() if runner == "v2-triton" else {}
    # Not before: both import vLLM, which looks for Triton once.
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from harness import graph_replay

    if runner == "v1-graphs":
        graph_replay.install()
    job = json.load(sys.stdin)
    defaults = dict(
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        max_num_batched_tokens=37,
        max_num_seqs=8,
        kv_cache_memory_bytes=32 << 20,
        disable_log_stats=False,
        compilation_config={"mode": 0},
    )
    llm = LLM(checkpoint, **defaults | job["settings"])
    assert llm.llm_engine.vllm_config.use_v2_model_runner == runner.startswith("v2")

    def metrics() -> dict[str, int]:
        found = llm.get_metrics()
        counted = {name: sum(entry.value for entry in found if entry.name == f"vllm:{name}") for name in METRICS}
        graphs = graph_replay.ReplayedGraph
        return counted | dict(kernels) | {"graph_captures": graphs.captures, "graph_replays": graphs.replays}

    ids = {}

    def adapter(folder: str) -> LoRARequest:
        return LoRARequest(folder, ids.setdefault(folder, len(ids) + 1), folder)

    greedy = dict(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5, detokenize=False)
    result, before = [], metrics()
    for batch in job["batches"]:
        prompts = [{"prompt_token_ids": request["prompt"]} for request in batch]
        parameters = [SamplingParams(**greedy | request.get("sampling", {})) for request in batch]
        adapters = [adapter(request["adapter"]) if request.get("adapter") else None for request in batch]
        outputs = llm.generate(prompts, parameters, use_tqdm=False, lora_request=adapters)
        after = metrics()
        moved = {name: after[name] - before.get(name, 0) for name in after}
        result.append({"outputs": [plain_output(output) for output in outputs], "metrics": moved})
        before = after
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
