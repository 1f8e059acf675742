"""What the tier asks, in order: first what everything else rests on, last what takes long and proves nothing.

Without a GPU the same commands run as a rehearsal: Triton's interpreter in the place of its compiler, the CPU's
attention in the place of CUDA's, tiny shapes in the place of the paper's.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import render
from benchmarks.results import ROOT, Result
from gpu.part import Part, Verdict, last_line

LIMIT_S = 8 * 60  # of all parts of `make gpu`
PATIENCE = 5  # times as long, and as long a part, for a rehearsal on a CPU, whose cores may be few and busy
CHECK = (sys.executable, "-c", "from vllm_yocou.cli.command_line import app; app()", "check", "--json")
# Its setting `pythonpath` would put this tree, whose package has no kernels, before the announced plugin.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=0", "-o", "pythonpath=")
INTERPRETED = {"TRITON_INTERPRET": "1"}
LONG_S = 30 * 60  # of a part that only `make gpu-all` asks
KERNELS_S, CHECK_S, SPEED_S = 120, 150, 180  # of a part of `make gpu`

# Tests of tests/gpu that run in processes of their own, by file and by what `pytest -k` takes.
APART = {
    "test_sleep.py": ("dense", "kernels", "tied", "mixture", "eager", "before_the_first_request"),
    "test_offloading.py": ("native", "simple-FLASH_ATTN", "simple-TRITON_ATTN"),
}

PIECEWISE = ("--compilation-config", json.dumps({"cudagraph_mode": "PIECEWISE"}))
EAGER = ("--enforce-eager",)
KERNELS = ("--additional-config", json.dumps({"yocou": {"kernels": True}}))
FLASH = ("--dtype", "bfloat16", "--attention-backend", "FLASH_ATTN")
TRITON = ("--dtype", "float32", "--attention-backend", "TRITON_ATTN")


def of_pytest(written: str) -> Verdict:
    summary = last_line(written).strip("= ")
    return Verdict(" passed" in summary, summary)  # tests that were all skipped show nothing


def of_check(graphs: str) -> Callable[[str], Verdict]:
    """Reads a report of the check, in which `graphs` must have been in force."""

    def read(written: str) -> Verdict:
        report = json.loads(written)
        modes = {model["facts"].get("cudagraph_mode") for model in report["models"]}
        if report["exact"] and modes != {graphs}:
            return Verdict(False, f"CUDA graphs {', '.join(map(str, modes))} were in force instead of {graphs}")
        return Verdict(report["exact"], report["verdict"])

    return read


def of_result(file: Path) -> Callable[[str], Verdict]:
    return lambda written: Verdict(True, f"\n{render.section(Result.load(file))}")


def quick(gpus: int, folder: Path) -> Iterator[Part]:
    """`make gpu`: eight minutes of one GPU, or a rehearsal where `gpus` is 0. Results go to `folder`."""
    precision = ieee(folder) if gpus else INTERPRETED
    yield Part("kernels", (*PYTEST, "-m", "not slow", "tests/kernels"), KERNELS_S, precision, of_pytest)
    if gpus:
        yield check("FLASH_ATTN, bfloat16, full and piecewise graphs", FLASH, "FULL_AND_PIECEWISE")
        yield check("FLASH_ATTN, bfloat16, piecewise graphs", FLASH + PIECEWISE, "PIECEWISE")
        yield check("FLASH_ATTN, bfloat16, eager", FLASH + EAGER, "NONE")
        yield check("TRITON_ATTN, float32, full and piecewise graphs", TRITON, "FULL_AND_PIECEWISE", precision)
        yield check("TRITON_ATTN, float32, eager", TRITON + EAGER, "NONE", precision)
    else:
        yield check("CPU_ATTN, float32, compiled", ("--dtype", "float32"), "NONE")
        yield check("CPU_ATTN, bfloat16, eager", ("--dtype", "bfloat16", *EAGER), "NONE")
    kept = folder / "gpu_speed.json"
    measured = (sys.executable, "-m", "benchmarks.gpu_speed", *([] if gpus else ["--tiny"]), "--to", str(kept))
    yield Part("prompts and decode steps of 8K and 64K tokens", measured, SPEED_S, {}, of_result(kept))


def more(gpus: int, folder: Path) -> Iterator[Part]:
    """What `make gpu-all` asks after that."""
    exact = ieee(folder) if gpus else {}
    if gpus:
        yield Part("all tests of the kernels", (*PYTEST, "tests/kernels"), LONG_S, exact, of_pytest)
        yield check("option kernels, bfloat16", ("--dtype", "bfloat16", *KERNELS), "FULL_AND_PIECEWISE")
        yield check("option kernels, float32, eager", TRITON + KERNELS + EAGER, "NONE", exact)
    else:
        yield Part("option kernels", why_not="an engine cannot run in Triton's interpreter as a user starts it")
    of_production = (
        (*TRITON, str(production(folder))) if gpus else ("--dtype", "float32", *EAGER, str(production(folder)))
    )
    yield check("the authors' switches", of_production, "FULL_AND_PIECEWISE" if gpus else "NONE", exact)
    company = (*PYTEST, "-s", "tests/gpu/test_batch_invariance.py")
    if gpus:
        apart = [f"--ignore=tests/gpu/{file}" for file in (*APART, "test_batch_invariance.py")]
        yield Part("engines that a CPU has none of", (*PYTEST, *apart, "tests/gpu"), LONG_S, {}, of_pytest)
        for file, cases in APART.items():
            for case in cases:
                command = (*PYTEST, "-k", case, f"tests/gpu/{file}")
                yield Part(f"{file.removesuffix('.py')}, {case}", command, LONG_S, {}, of_pytest)
        yield Part("company", company, LONG_S, {}, of_pytest)
        yield Part("batch invariance", company, LONG_S, {"VLLM_BATCH_INVARIANT": "1"}, of_pytest)
        breaking = {"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}
        # One model, since vLLM does not break the graphs of a second engine in the same process.
        settings = ("--dtype", "bfloat16", str(ROOT / "examples" / "yoco-u-kjv"))
        yield check("batch invariance in breakable graphs", settings, "FULL_AND_PIECEWISE", breaking)
    else:
        yield Part("engines that a CPU has none of", why_not="it needs a GPU")
        fixed = {"VLLM_BATCH_INVARIANT": "1"}
        yield check("batch invariance", ("--dtype", "bfloat16", *EAGER), "NONE", fixed)
    if gpus > 1 or not gpus:
        graphs = "FULL_AND_PIECEWISE" if gpus else "NONE"
        settings = () if gpus else ("--dtype", "float32", *EAGER)
        of_a_core = {} if gpus else {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # a machine may have one memory node
        yield check("two ranks", (*settings, "--tensor-parallel-size", "2"), graphs, of_a_core)
    else:
        yield Part("two ranks", why_not="there is one GPU")
    for name, words in (("gpu_exactness", []), ("kernels", []), ("gpu_decode", []), ("gpu_prefill", ["--long"])):
        if gpus:
            command = (sys.executable, "-m", "benchmarks", name, *words)
            yield Part(f"table {name}", command, LONG_S, {}, lambda written: Verdict(True, f"\n{written}"))
        else:
            yield Part(f"table {name}", why_not="it needs a GPU")


def production(folder: Path) -> Path:
    """A tiny checkpoint of the shape of the authors' production model: every switch that vLLM's CUDA kernels see."""
    from harness import tiny

    checkpoint = folder / "production"
    if not checkpoint.exists():
        tiny.model(tiny.AUTHORS["moe-v3-latent"]).save_pretrained(checkpoint)
    return checkpoint


def check(name: str, settings: tuple[str, ...], graphs: str, environment: dict[str, str] | None = None) -> Part:
    return Part(f"check, {name}", (*CHECK, *settings), CHECK_S, environment or {}, of_check(graphs))


def ieee(folder: Path) -> dict[str, str]:
    """Exact float32 products in Triton, whose cache does not tell kernels of another precision apart."""
    return {"TRITON_F32_DEFAULT": "ieee", "TRITON_CACHE_DIR": str(folder / "triton-ieee")}
