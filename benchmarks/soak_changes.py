"""What changes in a server while clients use it: nothing, its weights, or its adapters; and the settings for that."""

import asyncio
import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import torch

from benchmarks.promises import Expected, Mistake, Reference, Report
from benchmarks.results import ROOT
from benchmarks.server import Server
from benchmarks.soak_clients import Client
from benchmarks.soak_models import Models, Served

TRAINING = ROOT / "examples" / "training"
PERIOD_S = 10  # between two changes
SENT_S = 0.5  # after which a request that was sent has arrived: from 0.33 on, a paused vLLM refuses new ones
NOISE = 0.02  # of new weights and of adapters

Pool = Callable[[Reference], list[Expected]]


async def post(session: aiohttp.ClientSession, url: str, **settings: Any) -> None:
    async with session.post(url, **settings) as response:
        if response.status != 200:
            raise Mistake("changes are accepted", f"{response.status} for {url}: {(await response.text())[:200]}")


class Nothing:
    """The server stays as it is."""

    name: ClassVar[str] = "nothing"
    environment: ClassVar[dict[str, str]] = {}
    kv_cache: ClassVar[str] = "3M"
    preempts: ClassVar[bool] = True  # the cache is too small for the clients

    def __init__(self, reference: Reference, folder: Path):
        self.reference, self.folder = reference, folder
        self.made = 0

    def settings(self) -> list[str]:
        """More arguments of `vllm serve`."""
        return []

    @contextmanager
    def beside(self, command: list[str], limit_s: int) -> Iterator[None]:
        """What the server needs while it runs; `command` starts the server, and `limit_s` bounds its life."""
        yield

    def client(self, server: Server, models: Models, report: Report, seed: str) -> Client:
        return Client(server, models, report, seed)

    def models(self, server: Server, pool: Pool) -> Models:
        """What the server answers with before the first change."""
        self.server = server
        self.served = Models(Served(server.model, self.reference, pool(self.reference)))
        return self.served

    async def run(self, session: aiohttp.ClientSession, until: asyncio.Event) -> None:
        """Change something every PERIOD_S; what has begun is done before it ends."""
        while not until.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(until.wait(), PERIOD_S)
            if not until.is_set():
                try:
                    await self.change(session)
                except Mistake:
                    raise
                except Exception as error:  # whatever a client of vLLM's raises
                    raise Mistake("changes are accepted", repr(error)) from error

    async def change(self, session: aiohttp.ClientSession) -> None:
        pass


class Weights(Nothing):
    """Two sets of weights in turns, by the transfer of examples/training; requests under way finish with the old.

    Those that are preempted when the server pauses would go on with the new ones, so the cache has room for all.
    """

    name = "weights"
    kv_cache = "64M"
    preempts = False
    environment: ClassVar[dict[str, str]] = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(TRAINING)}

    def settings(self) -> list[str]:
        transfer = ["--weight-transfer-config", json.dumps({"backend": "buckets"})]
        return [*transfer, "--worker-extension-cls", "bucket_transfer.Registered"]

    def models(self, server: Server, pool: Pool) -> Models:
        models = super().models(server, pool)
        other = copy.deepcopy(self.reference)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in other.model.parameters():
                parameter.mul_(1 + NOISE * torch.randn_like(parameter))
        self.turns = [*models.choices, Served(server.model, other, pool(other))]
        return models

    async def change(self, session: aiohttp.ClientSession) -> None:
        now, new = self.turns
        with self.served.replaced_by(new):
            await asyncio.sleep(SENT_S)
            await post(session, f"{self.server.url}/pause", params={"mode": "wait"})
            try:
                await asyncio.to_thread(self.send, new.reference.model)
            finally:
                await post(session, f"{self.server.url}/resume")
        self.turns = [new, now]
        self.made += 1

    def send(self, model: torch.nn.Module) -> None:
        """Blocks while a bucket after the other is taken over."""
        if str(TRAINING) not in sys.path:
            sys.path.append(str(TRAINING))
        import bucket_transfer
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

        bucket_transfer.sender(model, HTTPVLLMWeightSyncClient(self.server.url)).send_weights()


class Adapters(Nothing):
    """A new adapter is loaded beside the model, and the one before it unloaded once nobody uses it."""

    name = "adapters"
    environment: ClassVar[dict[str, str]] = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}

    def settings(self) -> list[str]:
        return ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]

    def models(self, server: Server, pool: Pool) -> Models:
        models = super().models(server, pool)
        self.kinds = []
        for number in range(2):
            adapted = self.adapted(number)
            self.kinds.append((adapted, pool(adapted)))
        self.loaded: list[Served] = []
        return models

    def adapted(self, number: int) -> Reference:
        """Save an adapter; the reference with it merged into its weights."""
        import peft

        adapted = copy.deepcopy(self.reference)
        lora = peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
        model = peft.get_peft_model(adapted.model, lora)
        torch.manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=NOISE)
        model.save_pretrained(str(self.folder / f"adapter-{number}"))
        adapted.model = model.merge_and_unload().eval()
        return adapted

    async def change(self, session: aiohttp.ClientSession) -> None:
        reference, pool = self.kinds[self.made % 2]
        new = Served(f"adapter-{self.made}", reference, pool)
        path = str(self.folder / f"adapter-{self.made % 2}")
        load = dict(lora_name=new.name, lora_path=path)
        await post(session, f"{self.server.url}/v1/load_lora_adapter", json=load)
        self.served.choices.append(new)
        for old in self.loaded:
            self.served.choices.remove(old)
            while self.served.is_used(old):
                await asyncio.sleep(0.1)
            await post(session, f"{self.server.url}/v1/unload_lora_adapter", json=dict(lora_name=old.name))
        self.loaded = [new]
        self.made += 1
