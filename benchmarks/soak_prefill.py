"""A server that decodes what another one has computed: every prompt's cache comes through vLLM's NixlConnector."""

import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from benchmarks.promises import Expected, Mistake, Report
from benchmarks.server import Server, free_port, serving
from benchmarks.soak_changes import Nothing
from benchmarks.soak_clients import Client
from benchmarks.soak_models import Models

HOST, PORT = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"
# vLLM gives every server of a CPU all cores, on which the waiting threads of one keep those of the other from running.
CORES = "VLLM_CPU_OMP_THREADS_BIND"
# A cache that nobody fetches, because its client has left, is kept for minutes.
KEPT = "256M"


def role(name: str) -> str:
    """A `--kv-transfer-config`."""
    return json.dumps({"kv_connector": "NixlConnector", "kv_role": name, "kv_buffer_device": "cpu"})


def environment(server: int) -> dict[str, str]:
    """A port and a half of the cores for one of the two servers."""
    cores = sorted(os.sched_getaffinity(0))
    half = cores[server::2] or cores
    return {HOST: "127.0.0.1", PORT: str(free_port()), CORES: ",".join(map(str, half))}


class PrefillingClient(Client):
    """Asks the prefill node for one token, and then the server for the answer from the cache of that node.

    Several answers and scores of the prompt are asked of the server alone: a cache is fetched once, and scores are not
    in it.
    """

    def __init__(self, prefill_url: str, *arguments: Any):
        super().__init__(*arguments)
        self.prefill_url = prefill_url

    @asynccontextmanager
    async def post(
        self, session: aiohttp.ClientSession, expected: Expected, tokens: int, **settings: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if not {"n", "prompt_logprobs"} & settings.keys():
            settings["kv_transfer_params"] = await self.prefilled(session, expected)
        async with super().post(session, expected, tokens, **settings) as response:
            yield response

    async def prefilled(self, session: aiohttp.ClientSession, expected: Expected) -> dict[str, Any]:
        """Where the cache of the prompt is."""
        wanted = {"do_remote_decode": True, "do_remote_prefill": False}
        body = self.body(expected, 1, kv_transfer_params=wanted)
        async with session.post(f"{self.prefill_url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise Mistake("prompts are computed elsewhere", f"{response.status}: {(await response.text())[:200]}")
            return (await response.json())["kv_transfer_params"]


class Prefilled(Nothing):
    """The server gets caches of prompts from a second one, which computes nothing else."""

    name = "a prefill node beside it"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.environment = environment(0)  # type: ignore[misc]  # of this server

    def settings(self) -> list[str]:
        return ["--kv-transfer-config", role("kv_consumer")]

    @contextmanager
    def beside(self, command: list[str], limit_s: int) -> Iterator[None]:
        here = list(command)
        here[here.index("--kv-transfer-config") + 1] = role("kv_producer")
        here[here.index("--kv-cache-memory-bytes") + 1] = KEPT
        with serving(here, self.folder / "prefill.log", limit_s=limit_s, environment=environment(1)) as server:
            self.prefill_url = server.url
            yield

    def client(self, server: Server, models: Models, report: Report, seed: str) -> Client:
        return PrefillingClient(self.prefill_url, server, models, report, seed)
