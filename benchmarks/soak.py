"""Mixed clients check what a real server promises while its KV space is too small for them.

    python -m benchmarks soak --minutes 10

Each client has a random generator of its own, so its requests are the same for the same seed, however many of them the
time allows. Before the load starts the reference model computes the right answers to a small pool of prompts. A request
then costs a comparison only, and the server has the cores.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from random import Random
from typing import Any

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
    check_logprobs,
    check_preemptions,
    check_refusal,
    check_usage,
)
from benchmarks.results import Result
from benchmarks.server import VLLM, Server, serving

CHECKPOINT = Path(__file__).parent.parent / "examples" / "yoco-u-kjv"
TEXT = CHECKPOINT.parent / "evaluation" / "kjv_last_word.jsonl"
CONTEXT, CHUNK = 2048, 64
# Blocks are so small that requests grow while they run. The space holds one request of the whole context, or six short
# ones; the clients keep twelve in flight.
SETTINGS = f"--dtype float32 --max-model-len {CONTEXT} --kv-cache-memory-bytes 3M"
SETTINGS += f" --max-num-batched-tokens {CHUNK} --max-num-seqs 16 --host 127.0.0.1"
SETTINGS += ' --additional-config {"yocou":{"max_global_block":96}}'
CLIENTS = 12

# Around the window of 64 tokens and the global block of 96; the last two end at the context's limit.
LENGTHS = (1, 2, 63, 65, 96, 200, 289, 700, 1400, CONTEXT - 8, CONTEXT - 1)
TOKENS = 64  # of a continuation, at most
CHOICES = ("the LORD", "the king", "a great multitude of the people")

ANSWER_S = 180
IDLE_S = 30

# Body and a word that the refusal must name. Bytes go out as they are.
BAD = [
    (dict(prompt=[5] * (CONTEXT + 1)), "2048"),
    (dict(prompt=[5] * CONTEXT), "max_tokens"),
    (dict(prompt="In", max_tokens=-1), "max_tokens"),
    (dict(prompt="In", max_tokens="many"), "max_tokens"),
    (dict(prompt="In", temperature=-1), "temperature"),
    (dict(prompt="In", temperature=float("nan")), "temperature"),
    (dict(prompt="In", seed=1, temperature=1), "seed cannot be used"),
    (dict(prompt=[4096]), "vocab"),
    (dict(prompt=[]), "prompt"),
    (dict(prompt={}), "prompt"),
    (dict(prompt="In", model="nobody"), "nobody"),
    (dict(prompt="In", n=0), "n must be"),
    (dict(prompt="In", n=2, temperature=0), "greedy"),
    (dict(prompt="In", top_p=2), "top_p"),
    (dict(prompt="In", logprobs=1000), "logprobs"),
    (dict(prompt="In", prompt_logprobs=1, stream=True), "prompt_logprobs"),
    (dict(prompt="In", logit_bias={"99999": 1}), "logit_bias"),
    (dict(prompt="In", structured_outputs={"regex": "("}), "regex"),
    (dict(prompt="In", structured_outputs={"json": {"type": "nonsense"}}), "nonsense"),
    (b'{"prompt": "In", ', "JSON"),
]


PostRequest = AbstractAsyncContextManager[aiohttp.ClientResponse]


class Client:
    """Sends one request after the other, each of a kind that its generator draws; the methods below are the kinds."""

    def __init__(self, server: Server, reference: Reference, pool: list[Expected], report: Report, seed: str):
        self.server, self.reference, self.pool, self.report = server, reference, pool, report
        self.random = Random(seed)

    async def run(self, session: aiohttp.ClientSession, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self.request(session, self.random.choices(list(KINDS), list(KINDS.values()))[0])

    async def request(self, session: aiohttp.ClientSession, kind: str) -> None:
        self.kind = kind
        self.report.sent[kind] += 1
        try:
            await getattr(self, kind)(session)
        except Mistake as mistake:
            self.report.note(mistake)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.report.note(Mistake(f"requests are answered within {ANSWER_S} s", f"{kind}: {error!r}"))
            await asyncio.sleep(1)
        except (LookupError, ValueError, TypeError) as error:
            self.report.note(Mistake("answers are of the API's form", f"{kind}: {error!r}"))

    def draw(self) -> tuple[Expected, int]:
        """A prompt and how many tokens to ask for."""
        expected = self.random.choice(self.pool)
        return expected, self.random.randint(1, len(expected.tokens))

    def post(self, session: aiohttp.ClientSession, expected: Expected, tokens: int, **settings: Any) -> PostRequest:
        greedy = dict(temperature=0, ignore_eos=True, return_token_ids=True)
        body = dict(model=self.server.model, prompt=expected.prompt, max_tokens=tokens) | greedy | settings
        return session.post(f"{self.server.url}/v1/completions", json=body)

    async def answer(
        self, session: aiohttp.ClientSession, expected: Expected, tokens: int, **settings: Any
    ) -> list[dict]:
        """The choices."""
        async with self.post(session, expected, tokens, **settings) as response:
            if response.status != 200:
                text = await response.text()
                raise Mistake("good requests are answered 200", f"{response.status} for {self.kind}: {text[:200]}")
            choices = (await response.json())["choices"]
        if len(choices) != settings.get("n", 1):
            raise Mistake("answers are whole", f"{len(choices)} choices for {self.kind}")
        self.report.answered[self.kind] += 1
        return choices

    def compare(self, expected: Expected, served: list[int], tokens: int) -> None:
        if len(served) != tokens:
            raise Mistake("answers are whole", f"{len(served)} of {tokens} tokens for {self.kind}")
        self.report.tokens[self.kind] += tokens
        self.reference.check_tokens(expected, served)

    async def whole(self, session: aiohttp.ClientSession) -> None:
        expected, tokens = self.draw()
        (choice,) = await self.answer(session, expected, tokens)
        self.compare(expected, choice["token_ids"], tokens)

    async def at_the_limit(self, session: aiohttp.ClientSession) -> None:
        expected = self.random.choice(self.pool[-2:])
        tokens = CONTEXT - len(expected.prompt)
        (choice,) = await self.answer(session, expected, tokens)
        self.compare(expected, choice["token_ids"], tokens)

    async def several(self, session: aiohttp.ClientSession) -> None:
        """Sample with top_k 1, since vLLM refuses n > 1 at temperature 0."""
        expected, tokens = self.draw()
        for choice in await self.answer(session, expected, tokens, n=3, temperature=1, top_k=1):
            self.compare(expected, choice["token_ids"], tokens)

    async def scored(self, session: aiohttp.ClientSession) -> None:
        expected, tokens = self.draw()
        (choice,) = await self.answer(session, expected, tokens, prompt_logprobs=0)
        check_logprobs(expected, choice["prompt_logprobs"])
        self.compare(expected, choice["token_ids"], tokens)

    async def structured(self, session: aiohttp.ClientSession) -> None:
        expected, _ = self.draw()
        room = CONTEXT - len(expected.prompt)
        form = {"choice": CHOICES}
        (choice,) = await self.answer(
            session, expected, min(TOKENS, room), ignore_eos=False, structured_outputs=form, temperature=1
        )
        text = choice["text"]
        cut = choice["finish_reason"] == "length"
        if not any(text == form or (cut and form.startswith(text)) for form in CHOICES):
            raise Mistake("structured output has its form", f"{text!r} is not one of {', '.join(CHOICES)}")

    async def sampled(self, session: aiohttp.ClientSession) -> None:
        expected, tokens = self.draw()
        (choice,) = await self.answer(session, expected, tokens, temperature=1)
        if len(choice["token_ids"]) != tokens:
            raise Mistake("answers are whole", f"{len(choice['token_ids'])} of {tokens} tokens for {self.kind}")

    async def streamed(self, session: aiohttp.ClientSession) -> None:
        expected, tokens = self.draw()
        async with self.post(session, expected, tokens, stream=True) as response:
            served = [token async for token in streamed_tokens(response)]
        self.report.answered[self.kind] += 1
        self.compare(expected, served, tokens)

    async def aborted(self, session: aiohttp.ClientSession) -> None:
        """Ask for as many tokens as the context has room for, and leave after some of them or before the first."""
        expected, tokens = self.draw()
        wanted, served = self.random.choice((0, tokens)), []
        async with self.post(session, expected, CONTEXT - len(expected.prompt), stream=True) as response:
            if response.status != 200:
                raise Mistake("good requests are answered 200", f"{response.status} for a stream that is left")
            if wanted:
                async for token in streamed_tokens(response):
                    served.append(token)
                    if len(served) == wanted:
                        break
            response.close()
        self.report.aborted[self.kind] += 1
        self.compare(expected, served, wanted)

    async def bad(self, session: aiohttp.ClientSession) -> None:
        body, word = self.random.choice(BAD)
        if isinstance(body, dict):
            body = json.dumps(dict(model=self.server.model, max_tokens=4) | body).encode()
        headers = {"Content-Type": "application/json"}
        async with session.post(f"{self.server.url}/v1/completions", data=body, headers=headers) as response:
            check_refusal(response.status, await response.text(), word)
        self.report.answered[self.kind] += 1


# Weights with which a client draws them.
KINDS = dict(whole=4, streamed=4, aborted=4, at_the_limit=1, several=2, scored=2, structured=2, sampled=1, bad=4)


async def streamed_tokens(response: aiohttp.ClientResponse) -> AsyncIterator[int]:
    if response.status != 200:
        raise Mistake("good requests are answered 200", f"{response.status} for a stream: {await response.text()}")
    async for line in response.content:
        event = line.decode().removeprefix("data: ").strip()
        if not event or event == "[DONE]":
            continue
        event = json.loads(event)
        if "error" in event:
            raise Mistake("good requests are answered 200", f"a stream ended with {event['error']}")
        for choice in event["choices"]:
            for token in choice["token_ids"] or ():
                yield token


async def load(clients: list[Client], seconds: float) -> None:
    """Run the clients for so many seconds, until the last request has its answer."""
    async with session() as http:
        until_s = time.monotonic() + seconds
        await asyncio.gather(*(client.run(http, until_s) for client in clients))


async def warm_up(server: Server, text: list[int]) -> None:
    """Run steps of every number of rows in both decoders: a CPU's matrix products keep code for every shape."""
    async with session() as http:
        for rows in range(1, CHUNK + 1):
            body = dict(model=server.model, prompt=text[rows : 2 * rows], max_tokens=1, prompt_logprobs=0)
            async with http.post(f"{server.url}/v1/completions", json=body) as response:
                await response.read()


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S), connector=aiohttp.TCPConnector(limit=0))


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


def soak(server: Server, reference: Reference, seconds: float, seed: int) -> Report:
    pool = [reference.expect(prompt, min(TOKENS, CONTEXT - len(prompt))) for prompt in prompts()]
    report = Report()
    clients = [Client(server, reference, pool, report, f"{seed}/{number}") for number in range(CLIENTS)]
    try:
        start = idle_usage(server)
        asyncio.run(warm_up(server, pool[-1].prompt))
        asyncio.run(load(clients, seconds / 3))
        idle_usage(server)
        warm, before = memory(server.process), metric(server, "num_preemptions_total")
        asyncio.run(load(clients, seconds * 2 / 3))
        report.check(check_usage, start, idle_usage(server))
        end, preemptions = memory(server.process), metric(server, "num_preemptions_total") - before
    except (OSError, aiohttp.ClientError, psutil.Error) as error:
        report.note(Mistake("the server is alive", repr(error)))
    else:
        report.check(check_growth, warm, end)
        report.check(check_preemptions, preemptions)
        report.idle = {
            "preemptions": ("preemptions", preemptions),
            "memory when warm": ("MiB", warm / 2**20),
            "memory at the end": ("MiB", end / 2**20),
        }
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # A second thread costs a model of this size more than it brings.
    torch.set_num_threads(1)
    seconds = 60 * arguments.minutes
    reference = Reference(CHECKPOINT)
    with tempfile.TemporaryDirectory() as folder:
        command = [VLLM, "serve", str(CHECKPOINT), *SETTINGS.split()]
        with serving(command, Path(folder) / "log", limit_s=int(seconds) + 600) as server:
            report = soak(server, reference, seconds, arguments.seed)
    sizes = dict(clients=CLIENTS, minutes=arguments.minutes, seed=arguments.seed, kv_cache="3 MB")
    result = Result.here("soak", model=CHECKPOINT.name, dtype="float32", **sizes)
    report.add_to(result)
    if not report.mistakes:
        publish(result)
        return 0
    print(render.section(result))  # printed only: a broken promise leaves no result
    for sentence in report.sentences():
        progress(sentence)
    return 1


if __name__ == "__main__":
    sys.exit(main())
