"""A decode step: eager, with the loop compiled unrolled, and with one pass compiled once; and where its time goes."""

from benchmarks.engine import config, decoding, print_table, runner, start  # isort: skip
import statistics
import time
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch._inductor import config as inductor
from torch.profiler import ProfilerActivity, profile

from vllm_yocou import model
from vllm_yocou.compilation import compiled_unit
from vllm_yocou.model import Decoder, SelfDecoderLayer

BATCHES = (1, 8)
ROUNDS, STEPS, PROFILED = 12, 10, 4
SHAPE = "77M"


@compiled_unit(positions_N=0, x_ND=0)
class UnrolledSelfDecoder(Decoder):
    """All T passes in one compiled graph, as vLLM compiles a loop by itself."""

    def __init__(self, *, vllm_config, prefix, cache_prefix):
        cfg = vllm_config.model_config.hf_config
        super().__init__(
            SelfDecoderLayer(vllm_config, i, f"{prefix}.layers.{i}", cache_prefix)
            for i in range(cfg.num_self_decoder_layers)
        )
        self.iterations = [torch.tensor(t) for t in range(cfg.num_iterations)]

    def forward(self, positions_N, x_ND, iteration):
        for t in self.iterations:
            x_ND = super().forward(positions_N, x_ND, t)
        return x_ND


def engine(way: str):
    settings = dict(max_model_len=4096, max_num_seqs=max(BATCHES), kv_cache_memory_bytes=512 << 20)
    mode = 0 if way == "eager" else 3
    if way != "unrolled":
        return start(config(SHAPE), compilation_config={"mode": mode}, **settings)
    with patch.object(model, "SelfDecoder", UnrolledSelfDecoder):
        llm = start(config(SHAPE), compilation_config={"mode": mode}, **settings)
    looped = runner(llm).model.model
    looped.iterations = looped.iterations[:1]  # one call a step
    return llm


def kind(name: str) -> str | None:
    """What an operation of the profile is, by its own time; None for what runs Python itself."""
    if name.startswith(("vllm::", "## Call", "Torch-Compiled", "TorchDynamo", "Pregraph")) or "ompiledF" in name:
        return None
    if "cpu_attention" in name or "cpu_attn" in name or "flash" in name:
        return "attention"
    # Inductor names a fused kernel after all it feeds: `..._onednn_mm_...` there is not the product.
    return "products" if name in ("_C::onednn_mm", "aten::mm", "aten::addmm", "aten::linear") else "other"


def native_ms(llm) -> dict[str, float]:
    """Milliseconds a step inside native code, by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(PROFILED):
            llm.llm_engine.step()
    spent = dict.fromkeys(("products", "attention", "other"), 0.0)
    for event in profiled.events():
        if (what := kind(event.name)) is not None:
            spent[what] += event.self_cpu_time_total / 1e3 / PROFILED
    return spent


def step_ms(llm) -> float:
    start_s = time.perf_counter()
    llm.llm_engine.step()
    return (time.perf_counter() - start_s) * 1e3


def main() -> None:
    inductor.cpp.enable_kernel_profile = True  # names Inductor's kernels in a profile; costs nothing without one
    engines = {way: engine(way) for way in ("eager", "unrolled", "once")}
    rows = []
    for batch in BATCHES:
        steps, native = ({way: [] for way in engines} for _ in range(2))
        with ExitStack() as stack:
            for llm in engines.values():
                stack.enter_context(decoding(llm, batch))
            for _ in range(ROUNDS):
                for way, llm in engines.items():
                    steps[way] += [step_ms(llm) for _ in range(STEPS)]
                    native[way].append(native_ms(llm))
        medians = {way: statistics.median(times) for way, times in steps.items()}
        for way in engines:
            parts = {part: statistics.median(spent[part] for spent in native[way]) for part in native[way][0]}
            python = medians[way] - sum(parts.values())
            rows.append(
                [
                    batch,
                    way,
                    f"{medians[way]:.1f} ms",
                    f"{medians['eager'] / medians[way]:.2f}x",
                    f"{parts['products']:.1f} ms",
                    f"{parts['attention']:.1f} ms",
                    f"{parts['other']:.1f} ms",
                    f"{python:.1f} ms",
                    f"{python / medians[way]:.0%}",
                ]
            )
    header = ["batch", "self-decoder", "step", "eager / this", "products", "attention", "other native", "Python", ""]
    note = (
        f"{SHAPE} shape, float32, T = 3, contexts of 600 tokens. A step is a call of vLLM's engine; medians of "
        f"{ROUNDS * STEPS} steps in turn. Native time is the operations' own time in steps under torch's profiler "
        "between them, Python (with dispatch) the rest of a step without it."
    )
    print_table("Decode", note, header, rows)


if __name__ == "__main__":
    main()
