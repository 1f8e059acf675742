"""Clients that send one request after the other and check each answer, of whatever model the server has just then."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from random import Random
from typing import Any

import aiohttp

from benchmarks.promises import Expected, Mistake, Reference, Report, check_logprobs, check_refusal
from benchmarks.server import Server
from benchmarks.soak_models import Models

CONTEXT = 2048
ANSWER_S = 180

TOKENS = 64  # of a continuation, at most
CHOICES = ("the LORD", "the king", "a great multitude of the people")

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

    def __init__(self, server: Server, models: Models, report: Report, seed: str):
        self.server, self.models, self.report = server, models, report
        self.random = Random(seed)

    async def run(self, session: aiohttp.ClientSession, until_s: float) -> None:
        while time.monotonic() < until_s:
            await self.request(session, self.random.choices(list(KINDS), list(KINDS.values()))[0])

    async def request(self, session: aiohttp.ClientSession, kind: str) -> None:
        while self.models.coming is not None:
            await asyncio.sleep(0.1)
        self.kind = kind
        self.report.sent[kind] += 1
        try:
            with self.models.asked(self.random) as self.ticket:
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
        expected = self.random.choice(self.ticket.model.pool)
        return expected, self.random.randint(1, len(expected.tokens))

    def check(self, asked: Expected, function: Callable[[Reference, Expected], None]) -> None:
        """Raise Mistake unless the answer is right for one of the models that may have given it."""
        number = self.ticket.model.pool.index(asked)
        mistakes = []
        for model in self.ticket.possible:
            try:
                return function(model.reference, model.pool[number])
            except Mistake as mistake:
                mistakes.append(mistake)
        raise mistakes[0]

    def body(self, expected: Expected, tokens: int, **settings: Any) -> dict[str, Any]:
        greedy = dict(temperature=0, ignore_eos=True, return_token_ids=True)
        return dict(model=self.ticket.model.name, prompt=expected.prompt, max_tokens=tokens) | greedy | settings

    def post(self, session: aiohttp.ClientSession, expected: Expected, tokens: int, **settings: Any) -> PostRequest:
        return session.post(f"{self.server.url}/v1/completions", json=self.body(expected, tokens, **settings))

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

    def compare(self, expected: Expected, served: list[int], tokens: int, logprobs: list | None = None) -> None:
        if len(served) != tokens:
            raise Mistake("answers are whole", f"{len(served)} of {tokens} tokens for {self.kind}")
        self.report.tokens[self.kind] += tokens

        def is_of(reference: Reference, of_model: Expected) -> None:
            if logprobs is not None:
                check_logprobs(of_model, logprobs)
            reference.check_tokens(of_model, served)

        self.check(expected, is_of)

    async def whole(self, session: aiohttp.ClientSession) -> None:
        expected, tokens = self.draw()
        (choice,) = await self.answer(session, expected, tokens)
        self.compare(expected, choice["token_ids"], tokens)

    async def at_the_limit(self, session: aiohttp.ClientSession) -> None:
        expected = self.random.choice(self.ticket.model.pool[-2:])
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
        self.compare(expected, choice["token_ids"], tokens, choice["prompt_logprobs"])

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


def session() -> aiohttp.ClientSession:
    # vLLM closes a connection that was idle for 5 s. A request that is being sent on it then is lost.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_S), connector=connector)
