"""Start vLLM's OpenAI server on a checkpoint, say when it is ready and what to paste; what `make serve` runs.

Nothing here is needed to serve a model: it is `vllm serve CHECKPOINT` with settings for a small CPU machine.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

from vllm_yocou.cli.environment import processor

TRAINED = Path(__file__).parents[1] / "yoco-u-kjv"

READY = """
Ready. Paste this into another terminal:

    curl http://{host}:{port}/v1/completions -H 'Content-Type: application/json' \\
        -d '{{"model": "{name}", "prompt": "In the beginning", "max_tokens": 60}}'

or talk to it: {python} examples/inference/chat.py --url http://{host}:{port}/v1 (Ctrl-C here stops the server)
"""


# Instructions for products of bfloat16, by their names in /proc/cpuinfo. With them a processor is faster in bfloat16
# than in float32, and without them it takes several times as long (docs/serving.md).
BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}


def faster_dtype(features: list[str]) -> str:
    """The type in which a processor with these features serves faster."""
    return "bfloat16" if BFLOAT16_UNITS & set(features) else "float32"


def command(checkpoint: Path, host: str, port: int) -> list[str]:
    dtype = faster_dtype(processor()["features"])
    settings = f"--host {host} --port {port} --dtype {dtype} --kv-cache-memory-bytes 256M --max-num-batched-tokens 512"
    vllm = Path(sys.executable).parent / "vllm"
    return [str(vllm), "serve", str(checkpoint), "--served-model-name", checkpoint.name, *shlex.split(settings)]


def is_healthy(host: str, port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (OSError, HTTPException):  # URLError is an OSError
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=TRAINED)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments, more = parser.parse_known_args()  # the rest is vLLM's

    if is_healthy(arguments.host, arguments.port):
        print(f"port {arguments.port} already has a server: stop it or choose another with --port.", file=sys.stderr)
        return 2
    server = subprocess.Popen([*command(arguments.checkpoint, arguments.host, arguments.port), *more])
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        while server.poll() is None and not is_healthy(arguments.host, arguments.port):
            time.sleep(0.5)
        if server.poll() is None:
            python = (
                Path(sys.executable).relative_to(Path.cwd()) if sys.executable.startswith(str(Path.cwd())) else "python"
            )
            where = dict(host=arguments.host, port=arguments.port, name=arguments.checkpoint.name, python=python)
            print(READY.format(**where), flush=True)
        return server.wait()
    except KeyboardInterrupt:
        server.send_signal(signal.SIGINT)
        return server.wait()


if __name__ == "__main__":
    sys.exit(main())
