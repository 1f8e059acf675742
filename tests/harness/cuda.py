"""vLLM's CUDA platform on a machine without a GPU, as far as it only answers questions. A pytest plugin."""

import sys
from types import ModuleType

import pytest


@pytest.fixture
def cuda(monkeypatch) -> ModuleType:
    """The module of the platform, whose import loads extensions that a CPU build has not."""
    for name in ("vllm._C_stable_libtorch", "vllm._moe_C_stable_libtorch"):
        if name not in sys.modules:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
    import vllm.platforms.cuda

    return vllm.platforms.cuda
