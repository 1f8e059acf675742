"""Kernels are compiled on a GPU and interpreted elsewhere; Triton decides that for a process when it is imported.

A process that runs engines must not interpret, so `make test` runs these tests in one of their own.
"""

import os
from pathlib import Path

import pytest
import torch
from harness import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    interpreter.install()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or INTERPRETED:
        return
    reason = "without a GPU kernels run in Triton's interpreter, with TRITON_INTERPRET=1 (make test)"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def device():
    with torch.device("cpu" if INTERPRETED else "cuda"):
        yield
