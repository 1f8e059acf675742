"""Mixed clients check what a real server promises while its KV space is too small for them.

    python -m benchmarks soak --minutes 10

The time is divided among servers that change while they are used (soak_changes.py). Each client has a random generator
of its own, so its requests are the same for the same seed, however many of them the time allows (not so where
adapters come and go). Before the load starts
the reference model computes the right answers to a small pool of prompts. A request then costs a comparison only, and
the server has the cores.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import psutil
import torch
from transformers import AutoTokenizer

from benchmarks import render
from benchmarks.console import progress, publish
from benchmarks.promises import (
    Expected,
    Mistake,
    Reference,
    Report,
    check_growth,
    check_preemptions,
    check_usage,
)
from benchmarks.results import Result
from benchmarks.server import VLLM, Server, serving
from benchmarks.soak_changes import Adapters, Nothing, Weights
from benchmarks.soak_clients import CONTEXT, TOKENS, Client, session
from benchmarks.soak_prefill import Prefilled

CHECKPOINT = Path(__file__).parent.parent / "examples" / "yoco-u-kjv"
TEXT = CHECKPOINT.parent / "evaluation" / "kjv_last_word.jsonl"
# Blocks are so small that requests grow while they run. The space holds one request of the whole context, or six short
# ones; the clients keep twelve in flight.
SETTINGS = f"--dtype float32 --max-model-len {CONTEXT} --max-num-seqs 16 --host 127.0.0.1"
SETTINGS += ' --additional-config {"yocou":{"max_global_block":96}}'
CLIENTS, CHUNK = 12, 64

# Around the window of 64 tokens and the global block of 96; the last two end at the context's limit.
LENGTHS = (1, 2, 63, 65, 96, 200, 289, 700, 1400, CONTEXT - 8, CONTEXT - 1)
IDLE_S = 30
CHANGES: dict[str, type[Nothing]] = {kind.name: kind for kind in (Nothing, Weights, Adapters, Prefilled)}


def command(change: Nothing) -> list[str]:
    sizes = f"--kv-cache-memory-bytes {change.kv_cache} --max-num-batched-tokens {CHUNK}"
    return [VLLM, "serve", str(CHECKPOINT), *SETTINGS.split(), *sizes.split(), *change.settings()]


async def load(clients: list[Client], change: Nothing, seconds: float) -> None:
    """Run the clients for so many seconds, until the last request has its answer, while the server changes."""
    async with session() as http:
        done, until_s = asyncio.Event(), time.monotonic() + seconds

        async def ask() -> None:
            await asyncio.gather(*(client.run(http, until_s) for client in clients))
            done.set()

        await asyncio.gather(ask(), change.run(http, done))  # a change that fails ends the load


async def warm_up(server: Server, text: list[int]) -> None:
    """Run steps of every number of rows in both decoders: a CPU's matrix products keep code for every shape."""
    async with session() as http:
        for rows in range(1, CHUNK + 1):
            body = dict(model=server.model, prompt=text[rows : 2 * rows], max_tokens=1, prompt_logprobs=0)
            async with http.post(f"{server.url}/v1/completions", json=body) as response:
                await response.read()


def metric(server: Server, name: str) -> float:
    return sum(server.metric(f"vllm:{name}").values())


def idle_usage(server: Server) -> float:
    """The share of the KV cache in use when nothing runs; aborted requests end a little after their clients leave."""
    deadline_s = time.monotonic() + IDLE_S
    while time.monotonic() < deadline_s:
        if not any(metric(server, f"num_requests_{state}") for state in ("running", "waiting")):
            break
        time.sleep(0.5)
    return metric(server, "kv_cache_usage_perc")


def memory(process: subprocess.Popen) -> int:
    """Bytes that a process and its children have for themselves.

    The resident set would not do. It has pages of libraries, which the kernel drops and reads again at will (once it
    dropped a quarter of the set), and it counts shared pages once for each process.
    """
    parent = psutil.Process(process.pid)
    return sum(each.memory_full_info().uss for each in (parent, *parent.children(recursive=True)))


def prompts() -> Iterator[list[int]]:
    """A prompt of every length; every second one begins like the others, so that the cache holds its prefix."""
    items = [json.loads(line)["context"] for line in TEXT.read_text().splitlines()]
    text = AutoTokenizer.from_pretrained(CHECKPOINT).encode("\n".join(items))
    for i, length in enumerate(LENGTHS):
        start = i % 2 * i
        yield text[start : start + length]


def pool(reference: Reference) -> list[Expected]:
    return [reference.expect(prompt, min(TOKENS, CONTEXT - len(prompt))) for prompt in prompts()]


def soak(server: Server, change: Nothing, seconds: float, seed: int) -> Report:
    report = Report()
    models = change.models(server, pool)
    clients = [change.client(server, models, report, f"{seed}/{number}") for number in range(CLIENTS)]
    try:
        start = idle_usage(server)
        asyncio.run(warm_up(server, [*prompts()][-1]))
        asyncio.run(load(clients, change, seconds / 3))
        idle_usage(server)
        warm, before = memory(server.process), metric(server, "num_preemptions_total")
        asyncio.run(load(clients, change, seconds * 2 / 3))
        report.check(check_usage, start, idle_usage(server))
        end, preemptions = memory(server.process), metric(server, "num_preemptions_total") - before
    except Mistake as mistake:  # of a change
        report.note(mistake)
    except (OSError, aiohttp.ClientError, psutil.Error) as error:
        report.note(Mistake("the server is alive", repr(error)))
    else:
        report.check(check_growth, warm, end)
        if change.preempts:
            report.check(check_preemptions, preemptions)
        report.idle = {
            "changes": ("changes", change.made),
            "preemptions": ("preemptions", preemptions),
            "memory when warm": ("MiB", warm / 2**20),
            "memory at the end": ("MiB", end / 2**20),
        }
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of all servers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES), help="servers, by what changes")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # A second thread costs a model of this size more than it brings.
    torch.set_num_threads(1)
    seconds = 60 * arguments.minutes / len(arguments.changes)
    reference = Reference(CHECKPOINT)
    sizes = dict(clients=CLIENTS, minutes=arguments.minutes, seed=arguments.seed)
    result = Result.here("soak", model=CHECKPOINT.name, dtype="float32", **sizes)
    sentences = []
    for name in arguments.changes:
        progress(f"what changes: {name}")
        with tempfile.TemporaryDirectory() as folder:
            change = CHANGES[name](reference, Path(folder))
            log, limit_s = Path(folder) / "log", int(seconds) + 600
            starts = command(change)
            with (
                change.beside(starts, limit_s),
                serving(starts, log, limit_s=limit_s, environment=change.environment) as server,
            ):
                report = soak(server, change, seconds, arguments.seed)
        report.add_to(result, changes=name)
        sentences += [f"{name}: {sentence}" for sentence in report.sentences()]
    if not sentences:
        publish(result)
        return 0
    print(render.section(result))  # printed only: a broken promise leaves no result
    for sentence in sentences:
        progress(sentence)
    return 1


if __name__ == "__main__":
    sys.exit(main())
