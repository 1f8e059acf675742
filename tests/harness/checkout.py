"""What of this tree and this machine the tests use."""

import importlib
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import server

ROOT = Path(__file__).parents[2]
TRAINED = ROOT / "examples" / "yoco-u-kjv"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler on a CPU"
)


@contextmanager
def training_example(name: str):
    """The module of examples/training, whose neighbours it imports by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "training")
        yield importlib.import_module(name)


@contextmanager
def serving(folder: Path, *settings: str):
    """The trained checkpoint behind vLLM's OpenAI server, started as `make serve` does, with the log in `folder`.

    In float32, whatever the processor is faster in: answers are held to the bound of exactness.
    """
    command = [sys.executable, str(ROOT / "examples" / "inference" / "serve.py"), "--dtype", "float32", *settings]
    # The session's server lives from the first test that asks for it to the last.
    with server.serving(command, folder / "log", ready="Ready. Paste", limit_s=4 * 3600) as started:
        yield started
