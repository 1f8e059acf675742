"""Kernels are compiled on a GPU and interpreted elsewhere; Triton decides that for a process when it is imported.

A process that runs engines must not interpret, so `make test` runs these tests in one of their own, all but
test_compiled.py, which compiles and so must not interpret either.
"""

import os
from pathlib import Path

import pytest
import torch
from harness import interpreter

# vLLM's kernels leave the precision of float32 products to Triton, whose default is TF32.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpreter.install()
MOST_POISONED = 1 << 24  # numbers; tests of huge caches touch a few of their pages only


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        if item.path.stem == "test_compiled":
            if INTERPRETED:
                item.add_marker(pytest.mark.skip(reason="TRITON_INTERPRET=1: nothing is compiled in this process"))
        elif not (INTERPRETED or torch.cuda.is_available()):
            reason = "without a GPU kernels run in Triton's interpreter, with TRITON_INTERPRET=1 (make test)"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def interpreted():
    """Puts tensors where the kernels of this process run."""
    with torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that a kernel's launcher asks for holds NaN, so that what no program writes cannot pass for a result.

    The default device is named: once torch.empty is another function, torch does not know it as one that makes tensors.
    """
    empty = torch.empty

    def poisoned(*size, **settings):
        tensor = empty(*size, **{"device": torch.get_default_device()} | settings)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.numel() <= MOST_POISONED else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
