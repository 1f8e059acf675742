"""Settings that every test needs before torch starts its threads, and the one server that the online tests share."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINED = ROOT / "examples" / "yoco-u-kjv"
START_SECONDS = 180

# Tiny tensors: a second thread costs more than it brings. In-process engines bind no threads by themselves either.
os.environ["OMP_NUM_THREADS"] = "1"
# Engines of the tests live in the test process, where scheduler and runner can be looked at.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"


def user_environment() -> dict[str, str]:
    """The environment of a person who starts a program: without the settings for engines inside the tests."""
    ours = ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING")
    return {name: value for name, value in os.environ.items() if name not in ours}


def pytest_terminal_summary(terminalreporter):
    from oracle import checked

    if checked:
        terminalreporter.section("served model against the reference, float32")
        for test, difference, compared, rounding in checked:
            terminalreporter.write_line(
                f"|Δlogprob| <= {difference:.1e} of {compared:5} values, reference's rounding {rounding:.1e}: {test}"
            )


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch's compiler needs a C++ compiler on a CPU"
)


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    """What the plugin logs, taken by a filter: vLLM drops handlers when an engine configures logging."""
    collected, logger = [], logging.getLogger("vllm.plugins.yocou")
    monkeypatch.setattr(logger, "filters", [lambda record: collected.append(record.getMessage())])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    return collected


@dataclass(frozen=True)
class Server:
    url: str
    model: str

    def metric(self, name: str) -> dict[str, float]:
        """Value by engine."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith(f"{name}{{")]
        return {line.split('engine="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


@contextmanager
def serving(folder: Path, *settings: str):
    """The trained checkpoint behind vLLM's OpenAI server, started as `make serve` does, with the log in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "log"
    start = [sys.executable, str(ROOT / "examples" / "serve.py"), "--port", str(port), *settings]
    with log.open("w") as out:
        # `timeout` bounds its life, whatever becomes of the tests.
        process = subprocess.Popen(
            ["timeout", "1200", *start], stdout=out, stderr=subprocess.STDOUT, env=user_environment()
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Ready. Paste" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, "the server did not get ready"
            time.sleep(0.5)
        yield Server(f"http://127.0.0.1:{port}", TRAINED.name)
    except BaseException:
        print(log.read_text()[-5000:])
        raise
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as started:
        yield started
