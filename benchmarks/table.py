"""Markdown tables that say what they were measured on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def machine() -> str:
    """The GPU's name, or the number of cores and the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def print_table(title: str, note: str, header: list[str], rows: list[list]) -> None:
    print(f"\n### {title}\n\n{note} Machine: {machine()}; vLLM {version('vllm')}, torch {torch.__version__}.\n")
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)
