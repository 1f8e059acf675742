"""A server in a process of its own, as a user starts it: on a free loopback port, bounded in time, its log kept."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

VLLM = str(Path(sys.executable).with_name("vllm"))
READY = "Application startup complete"
START_S = 300


def user_environment() -> dict[str, str]:
    """The environment of a person who starts a program: without settings for engines in this process, or of `make`."""
    ours = ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    return {name: value for name, value in os.environ.items() if name not in ours}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    process: subprocess.Popen

    def metric(self, name: str) -> dict[str, float]:
        """Value by engine; LookupError for a name that the server does not count."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = [line for line in answer.read().decode().splitlines() if line.startswith(f"{name}{{")]
        if not lines:
            raise LookupError(f"{name} is not among the server's metrics")
        return {line.split('engine="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}


@contextmanager
def serving(
    command: list[str],
    log: Path,
    ready: str = READY,
    limit_s: int = 1200,
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Run `command` with --port; yield its `Server` once the log says `ready`.

    Args:
        environment: variables beside the user's.
    """
    port = free_port()
    with log.open("w") as out:
        # `timeout` bounds its life, whatever becomes of this process.
        process = subprocess.Popen(
            ["timeout", "--kill-after=30", str(limit_s), *command, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=user_environment() | (environment or {}),
        )
    try:
        deadline_s = time.monotonic() + START_S
        while ready not in log.read_text():
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < deadline_s, "the server did not get ready"
            time.sleep(0.5)
        url = f"http://127.0.0.1:{port}"
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            model = json.load(answer)["data"][0]["id"]
        yield Server(url, model, process)
    except BaseException:
        print(log.read_text()[-5000:])
        raise
    finally:
        process.terminate()
        process.wait(60)
