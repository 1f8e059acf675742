"""A KV connector that keeps pages in this process's memory, layer by layer, and ends the engine over a wrong hook.

Name it to vLLM with `transfer(store)`. Engines of one process that name the same store share what is in it. It saves a
prompt's global pages step by step as they fill, and its windows once, with the step that ends the prompt: the pages of
the last W tokens. So a prompt is found again where a stored prompt ends, and no other pages of windows are ever saved
or loaded. Pages are copied as a whole, since only a backend knows how it lays tokens out in one.

What the hooks must do, in each step that computes tokens, for each layer with a cache: wait once, then save once. Until
a layer is waited for, the pages that it loads are NaN; none that has a NaN may be saved.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

RUBBISH = 1e4  # what a load leaves that broke off: nobody may read it, but kernels may multiply it by zero
COUNTS = ("saved_bytes", "loaded_bytes", "loads", "failed_loads")


class WrongHook(Exception):
    """A hook of a step was called twice, out of order or not at all, or has met pages that were never loaded."""


class Store:
    """Pages by (layer, tokens of the prompt up to where the page ends, index of the page).

    Attributes:
        saved, loaded: bytes, by the prompt of the request that saved or loaded them.
        failures: loads that are still to fail half-way.
        counts: of COUNTS, over the life of the store.
    """

    def __init__(self) -> None:
        self.pages: dict[tuple, torch.Tensor] = {}
        self.saved: Counter[tuple[int, ...]] = Counter()
        self.loaded: Counter[tuple[int, ...]] = Counter()
        self.failures: int | None = None
        self.counts = Counter(dict.fromkeys(COUNTS, 0))


STORES: dict[str, Store] = {}


def store(name: str) -> Store:
    return STORES.setdefault(name, Store())


def transfer(
    name: str, role: str = "kv_both", asynchronous: bool = False, failures: int = 0, policy: str = "recompute"
) -> dict:
    """For vLLM's setting `kv_transfer_config`.

    Args:
        name: of the store.
        asynchronous: load between the steps, as connectors over a network do, and not in the step that needs it.
        failures: how many loads fail half-way, the first ones.
        policy: vLLM's, for requests whose load failed: "recompute" or "fail".
    """
    return dict(
        kv_connector=MemoryConnector.__name__,
        kv_connector_module_path=__name__,
        kv_role=role,
        kv_load_failure_policy=policy,
        kv_connector_extra_config=dict(store=name, asynchronous=asynchronous, failures=failures),
    )


@dataclass(frozen=True)
class Layer:
    """A cached layer: the KV cache group that it is in, tokens of a page, and its window, or None for every token."""

    name: str
    group: int
    block: int
    window: int | None

    def last(self, tokens: int) -> int:
        """Where those of so many tokens begin that are kept."""
        return 0 if self.window is None else max(0, tokens - self.window)

    def pages(self, prompt: list[int], first: int, end: int) -> Iterator[tuple[int, tuple]]:
        """Index and key of the pages with the tokens from `first` to `end` of a stored prompt."""
        for index in range(first // self.block, ceil(end / self.block)):
            # A window serves its own prompt alone, a global page all that go on from it.
            known = len(prompt) if self.window else min((index + 1) * self.block, len(prompt))
            yield index, (self.name, tuple(prompt[:known]), index)


@dataclass(frozen=True)
class Page:
    """A page of one layer that a request loads or saves: its block here, and its key in the store."""

    request: str
    prompt: tuple[int, ...]
    layer: str
    block: int
    key: tuple


@dataclass
class Step(KVConnectorMetadata):
    """What the scheduler's connector tells the worker's.

    Attributes:
        computes: whether the step has a forward pass.
        loads: what it needs.
        arriving: what later steps will need.
        saves: what it completes.
    """

    computes: bool
    loads: list[Page] = field(default_factory=list)
    arriving: list[Page] = field(default_factory=list)
    saves: list[Page] = field(default_factory=list)


class MemoryConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self.store, self.asynchronous = store(extra["store"]), extra["asynchronous"]
        if role == KVConnectorRole.SCHEDULER:
            self.store.failures = extra["failures"]
        self.layers = {layer.name: layer for layer in cached_layers(kv_cache_config)}
        # Of the scheduler's:
        self.requests: dict[str, Any] = {}
        self.found: dict[str, tuple[int, int, list[int]]] = {}  # tokens here, tokens of the hit, the stored prompt
        self.admitted: list[str] = []  # since the last step, of those found
        self.broken: set[str] = set()  # whose loads broke off: they are not offered again
        # Of the worker's:
        self.caches: dict[str, torch.Tensor] = {}
        self.waited: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.under_way: dict[str, list[list[Page]]] = {}
        self.failed_blocks: set[int] = set()
        self.failed_requests: set[str] = set()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return True  # the hooks of a layer would not run in a replayed graph

    # The scheduler's.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        tokens = list(request.all_token_ids)
        if self._kv_transfer_config.is_kv_consumer and request.request_id not in self.broken:
            for length in range(len(tokens), num_computed_tokens, -1):
                hit = min(length, len(tokens) - 1)  # a token has to be computed to go on from
                if hit > num_computed_tokens and self.holds(tokens[:length], num_computed_tokens):
                    self.found[request.request_id] = (num_computed_tokens, hit, tokens[:length])
                    return hit - num_computed_tokens, self.asynchronous
        return 0, False

    def holds(self, prompt: list[int], here: int) -> bool:
        return all(
            key in self.store.pages
            for layer in reversed(self.layers.values())
            for _, key in layer.pages(prompt, max(here, layer.last(len(prompt))), len(prompt))
        )

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.requests[request.request_id] = request
        if num_external_tokens:
            self.admitted.append(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        scheduled = scheduler_output.num_scheduled_tokens
        step = Step(computes=bool(scheduled))
        for request in self.admitted:
            pages = step.arriving if self.asynchronous else step.loads
            pages += self.to_load(self.requests[request], *self.found.pop(request))
        self.admitted.clear()
        if self._kv_transfer_config.is_kv_producer:
            cached = scheduler_output.scheduled_cached_reqs
            before = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
            before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            for request, tokens in scheduled.items():
                step.saves += self.to_save(self.requests[request], before[request] + tokens)
        return step

    def to_load(self, request: Any, here: int, hit: int, prompt: list[int]) -> Iterator[Page]:
        for layer in self.layers.values():
            # The next token sees one token fewer of a window than the window has: itself is in it.
            for index, key in layer.pages(prompt, max(here, layer.last(hit + 1)), hit):
                yield self.page(request, layer, index, key)

    def to_save(self, request: Any, computed: int) -> Iterator[Page]:
        prompt = request.prompt_token_ids
        for layer in self.layers.values():
            if layer.window and computed < len(prompt):
                continue
            for index, key in layer.pages(prompt, layer.last(len(prompt)), len(prompt)):
                is_full = computed >= min((index + 1) * layer.block, len(prompt))
                if is_full and key not in self.store.pages:
                    yield self.page(request, layer, index, key)

    def page(self, request: Any, layer: Layer, index: int, key: tuple) -> Page:
        block = self._kv_cache_manager.get_block_ids(request.request_id)[layer.group][index]
        if block == 0:
            raise WrongHook(f"page {index} of {layer.name} has no block any more, or none yet")
        return Page(request.request_id, tuple(request.prompt_token_ids), layer.name, block, key)

    def update_connector_output(self, connector_output: Any) -> None:
        self.broken |= connector_output.failed_recving

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        self.requests.pop(request.request_id, None)
        self.found.pop(request.request_id, None)
        if request.request_id in self.admitted:
            self.admitted.remove(request.request_id)
        return False, None

    # The worker's.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert {name: cache.shape[2] for name, cache in kv_caches.items()} == {
            layer.name: layer.block for layer in self.layers.values()
        }
        self.caches = kv_caches

    @property
    def step(self) -> Step:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Step)
        return metadata

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.waited.clear()
        self.written.clear()
        self.failed_blocks.clear()
        self.failed_requests &= set(self.under_way)

    def memory(self, page: Page) -> torch.Tensor:
        """(K, tokens, 2 · d), the engine's own."""
        return self.caches[page.layer][page.block]

    def load(self, page: Page) -> None:
        stored = self.store.pages[page.key]
        self.memory(page).copy_(stored)
        self.store.loaded[page.prompt] += stored.nbytes
        self.store.counts["loaded_bytes"] += stored.nbytes

    def fails(self) -> bool:
        """Whether the load that begins now will fail."""
        self.store.counts["loads"] += 1
        assert self.store.failures is not None
        failing = self.store.failures > 0
        self.store.failures -= failing
        self.store.counts["failed_loads"] += failing
        return failing

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        step = self.step
        for page in (*step.loads, *step.arriving):
            self.memory(page).fill_(float("nan"))
        for request in by_request(step.loads):
            if self.fails():
                self.failed_requests.add(request)
        for request, pages in by_request(step.arriving).items():
            half = ceil(len(pages) / 2)
            self.under_way[request] = [pages[:half], pages[half:]]
            if self.fails():
                self.failed_requests.add(request)

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.waited[layer_name] += 1
        if self.waited[layer_name] > 1:
            raise WrongHook(f"{layer_name} is waited for twice in a step")
        breaks_off = len(self.waited) > len(self.layers) / 2
        for page in self.step.loads:
            if page.layer != layer_name:
                continue
            if breaks_off and page.request in self.failed_requests:
                self.memory(page).fill_(RUBBISH)
                self.failed_blocks.add(page.block)
            else:
                self.load(page)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        self.written[layer_name] += 1
        if self.written[layer_name] > 1 or not self.waited[layer_name]:
            raise WrongHook(f"{layer_name} is saved twice in a step, or before it is waited for")
        if kv_layer.data_ptr() != self.caches[layer_name].data_ptr():
            raise WrongHook(f"{layer_name} is saved from other memory than it was registered with")
        for page in self.step.saves:
            if page.layer != layer_name or page.request in self.failed_requests or page.key in self.store.pages:
                continue
            written = self.memory(page).clone()
            if written.isnan().any():
                raise WrongHook(f"a page of {layer_name} is saved that was never loaded")
            self.store.pages[page.key] = written
            self.store.saved[page.prompt] += written.nbytes
            self.store.counts["saved_bytes"] += written.nbytes

    def wait_for_save(self) -> None:
        for hook, called in (("waited for", self.waited), ("saved", self.written)):
            missing = set(self.layers) - set(called)
            if missing and self.step.computes:
                raise WrongHook(f"{sorted(missing)} are not {hook} in a step with a forward pass")
            if called and not self.step.computes:
                raise WrongHook(f"{sorted(called)} are {hook} in a step without a forward pass")

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults()
        for request, halves in list(self.under_way.items()):
            half = halves.pop(0)
            broke_off = request in self.failed_requests and not halves
            for page in half:
                if broke_off:
                    self.memory(page).fill_(RUBBISH)
                else:
                    self.load(page)
            if broke_off:
                results.failed_recving.add(request)
                self.failed_requests.discard(request)
            if not halves:
                results.finished_recving.add(request)
                del self.under_way[request]
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set(self.failed_blocks)


def by_request(pages: list[Page]) -> dict[str, list[Page]]:
    grouped: dict[str, list[Page]] = {}
    for page in pages:
        grouped.setdefault(page.request, []).append(page)
    return grouped


def cached_layers(kv_cache_config: Any) -> Iterator[Layer]:
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        for name in group.layer_names:
            # Without vLLM's hybrid manager, one group has layers of several kinds.
            spec = getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec)
            yield Layer(name, number, spec.block_size, spec.sliding_window)


def counts() -> dict[str, int]:
    """COUNTS, over all stores of this process."""
    return {name: sum(one.counts[name] for one in STORES.values()) for name in COUNTS}
