"""What a bug report says about the machine: versions, platform, processor and settings, and never a secret.

It imports neither torch nor vLLM: a report must come out where they do not start, and within a second.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_yocou import __version__

PACKAGES = ("vllm", "torch", "transformers", "triton")
CPUINFO = Path("/proc/cpuinfo")
# Flags of /proc/cpuinfo that decide which kernels vLLM and torch choose, by the names that they are known under.
FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "amx_tile": "amx_tile",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "neon": "neon",
    "asimd": "neon",  # as 64-bit ARM calls it
    "sve": "sve",
    "bf16": "bf16",
    "i8mm": "i8mm",
}
SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCHDYNAMO_DISABLE", "HF_HUB_OFFLINE", "TRITON_INTERPRET")
SECRETS = ("KEY", "TOKEN", "SECRET")
HIDDEN = "(set, not shown)"


def describe() -> dict[str, Any]:
    """Versions, platform, processor and settings of this process, as JSON can hold them.

    Returns:
        `versions`: package -> version, None for an absent one. `platform`: `system`, `machine` and `gpus`, their names.
        `processor`: `name`, `cores` that this process may use, `features`. `settings`: variable -> value.
    """
    return {
        "versions": versions(),
        "platform": {"system": platform.platform(), "machine": platform.machine(), "gpus": gpus()},
        "processor": processor(),
        "settings": settings(os.environ),
    }


def versions() -> dict[str, str | None]:
    """Package -> installed version, None for a package that is not installed."""
    found: dict[str, str | None] = {"vllm_yocou": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"python": platform.python_version()}


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs, from the driver's own tool: asking CUDA would create a context on each of them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a tool without a driver is not a GPU
        return []
    return [line.strip() for line in printed.splitlines() if line.strip()]


def processor(cpuinfo: Path = CPUINFO) -> dict[str, Any]:
    """`name`, `cores` that this process may use, and `features`; name and features are empty without `cpuinfo`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    first: dict[str, str] = {}  # the first core speaks for all
    for line in lines:
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    flags = set(first.get("flags", first.get("Features", "")).split())  # x86, ARM
    features = dict.fromkeys(name for flag, name in FEATURES.items() if flag in flags)
    return {"name": first.get("model name", ""), "cores": cores, "features": list(features)}


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environ` that vLLM and its dependencies read; of secrets only that they are set."""
    found = {name: environ[name] for name in sorted(environ) if name.startswith("VLLM_") or name in SETTINGS}
    return {
        name: HIDDEN if any(secret in name.upper() for secret in SECRETS) else value for name, value in found.items()
    }
