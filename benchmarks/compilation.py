"""Decode, where its time goes, and prefill: eager, with the loop compiled unrolled, and with one pass compiled once."""

from benchmarks.engine import Stopwatch, config, decoding, prompt_s, runner, start

import time
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile
from vllm import LLM
from vllm.config import VllmConfig

from benchmarks.console import progress, publish
from benchmarks.precision import in_each_dtype
from benchmarks.results import Key, Result
from vllm_yocou.serving import model
from vllm_yocou.serving.compilation import compiled_unit
from vllm_yocou.serving.model import SelfDecoderLayer

BATCHES = (1, 8)
ROUNDS, STEPS, PROFILED = 12, 10, 4
PROMPT, PROMPTS, CONTEXT = 2048, 5, 600
SHAPE = "57M"
NAMES = {"eager": "eager", "unrolled": "compiled unrolled", "once": "compiled once"}


@compiled_unit(positions_N=0, x_ND=0)
class UnrolledSelfDecoder(torch.nn.Module):
    """All T passes in one compiled graph, as vLLM compiles a loop by itself."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str, cache_prefix: str) -> None:
        super().__init__()
        cfg = vllm_config.model_config.hf_config
        self.layers = torch.nn.ModuleList(
            SelfDecoderLayer(vllm_config, i, f"{prefix}.layers.{i}", cache_prefix)
            for i in range(cfg.num_self_decoder_layers)
        )
        self.iterations = [torch.tensor(t) for t in range(cfg.num_iterations)]

    def forward(self, positions_N: torch.Tensor, x_ND: torch.Tensor, iteration: torch.Tensor) -> torch.Tensor:
        for t in self.iterations:
            for layer in self.layers:
                x_ND = layer(positions_N, x_ND, t)
        return x_ND


def engine(way: str, dtype: str) -> LLM:
    settings: dict[str, Any] = dict(
        dtype=dtype, max_model_len=4096, max_num_seqs=max(BATCHES), kv_cache_memory_bytes=512 << 20
    )
    mode = 0 if way == "eager" else 3
    if way != "unrolled":
        return start(config(SHAPE), compilation_config={"mode": mode}, **settings)
    with patch.object(model, "SelfDecoder", UnrolledSelfDecoder):
        llm = start(config(SHAPE), compilation_config={"mode": mode}, **settings)
    looped = runner(llm).model.model
    looped.iterations = looped.iterations[:1]  # one call a step
    return llm


def kind(name: str) -> str | None:
    """The part of a step that an operation of the profile belongs to; None for operations that only run Python."""
    if name.startswith(("vllm::", "## Call", "Torch-Compiled", "TorchDynamo", "Pregraph", "AOTDispatcher")):
        return None
    if "cpu_attention" in name or "cpu_attn" in name or "flash" in name:
        return "attention"
    # Inductor names a fused kernel after everything that it feeds, so `..._onednn_mm_...` is not a product.
    return "products" if name in ("_C::onednn_mm", "aten::mm", "aten::addmm", "aten::linear") else "other native"


def native_ms(llm: LLM) -> dict[str, float]:
    """Milliseconds that a step spends in native code, by part."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(PROFILED):
            llm.llm_engine.step()
    spent = dict.fromkeys(("products", "attention", "other native"), 0.0)
    for event in profiled.events():
        if (what := kind(event.name)) is not None:
            spent[what] += event.self_cpu_time_total / 1e3 / PROFILED
    return spent


class Clock:
    """Times the model and its head, so that the rest of a step is known."""

    def __init__(self, llm: LLM) -> None:
        self.inside, model = Stopwatch(), runner(llm).model
        model.forward = self.inside.timed(model.forward)
        model.compute_logits = self.inside.timed(model.compute_logits)

    def step_ms(self, llm: LLM) -> tuple[float, float]:
        """Milliseconds of a step, and those of them that pass outside the model."""
        self.inside.s, start_s = 0.0, time.perf_counter()
        llm.llm_engine.step()
        step_s = time.perf_counter() - start_s
        return step_s * 1e3, (step_s - self.inside.s) * 1e3


def decode(engines: dict[str, LLM], result: Result) -> None:
    clocks = {way: Clock(llm) for way, llm in engines.items()}
    for batch in BATCHES:
        steps: dict[str, list[tuple[float, float]]] = {way: [] for way in engines}
        native: dict[str, list[dict[str, float]]] = {way: [] for way in engines}
        with ExitStack() as stack:
            for llm in engines.values():
                stack.enter_context(decoding(llm, batch, CONTEXT))
            for number in range(ROUNDS):
                progress(f"decode, batch {batch}, round {number + 1} of {ROUNDS}")
                for way, llm in engines.items():
                    steps[way] += [clocks[way].step_ms(llm) for _ in range(STEPS)]
                    native[way].append(native_ms(llm))
        for way in engines:
            of: dict[str, Key] = dict(batch=batch, way=NAMES[way])
            whole, around = zip(*steps[way], strict=True)
            result.add("step", "ms", whole, **of)
            result.add("around the model", "ms", around, **of)
            for part in native[way][0]:
                result.add(part, "ms", [spent[part] for spent in native[way]], **of)


def prefill(engines: dict[str, LLM], result: Result) -> None:
    """Add the seconds of prompts that run one at a time."""
    times: dict[str, list[float]] = {way: [] for way in engines}
    for number in range(PROMPTS):
        progress(f"prompts, round {number + 1} of {PROMPTS}")
        for way, llm in engines.items():
            times[way].append(prompt_s(llm, PROMPT))
    for way, seconds in times.items():
        result.add("prompt", "s", seconds, way=NAMES[way])


def measure(dtype: str = "float32") -> Result:
    inductor.cpp.enable_kernel_profile = True  # names Inductor's kernels in a profile; costs nothing without one
    sizes = dict(shape=SHAPE, dtype=dtype, iterations=config(SHAPE).num_iterations, context=CONTEXT)
    result = Result.here("compilation", **sizes, steps=ROUNDS * STEPS, prompt=PROMPT, prompts=PROMPTS)
    engines = {way: engine(way, dtype) for way in NAMES}
    prefill(engines, result)
    decode(engines, result)
    return result


if __name__ == "__main__":
    publish(in_each_dtype(measure))
