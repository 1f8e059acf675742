"""A KV connector that keeps pages in this process's memory, layer by layer, and ends the engine over a wrong hook.

Name it to vLLM with `transfer(store)`. Engines of one process that name the same store share what is in it. It saves a
prompt's global pages step by step as they fill, and its windows once, with the step that ends the prompt: the last W
tokens. So a prompt is found again where a stored prompt ends, and windows beyond that are neither saved nor loaded.

What the hooks must do, in each step that computes tokens, for each layer with a cache: wait once, then save once. Until
a layer is waited for, what it loads is NaN in its pages; nothing with a NaN may be saved.
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

COUNTS = ("saved_bytes", "loaded_bytes", "loads", "failed_loads")


class WrongHook(Exception):
    """A hook of a step was called twice, out of order or not at all, or has met pages that were never loaded."""


class Store:
    """Pages by (layer, tokens of the prompt up to where the page ends, index of the page): (first token, page).

    Attributes:
        saved, loaded: bytes, by the prompt of the request that saved or loaded them.
        failures: loads that are still to fail half-way.
        counts: of COUNTS, over the life of the store.
    """

    def __init__(self) -> None:
        self.pages: dict[tuple, tuple[int, torch.Tensor]] = {}
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
class Piece:
    """Tokens `first` to `end` of a request, all in one page of one layer: where they are here, and in the store."""

    request: str
    prompt: tuple[int, ...]
    layer: str
    block: int
    start: int  # the page's first token
    first: int
    end: int
    key: tuple

    @property
    def slots(self) -> slice:
        return slice(self.first - self.start, self.end - self.start)


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
    loads: list[Piece] = field(default_factory=list)
    arriving: list[Piece] = field(default_factory=list)
    saves: list[Piece] = field(default_factory=list)


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
        self.found: dict[str, tuple[int, int, list[int]]] = {}  # tokens here, tokens to load, the stored prompt
        # Of the worker's:
        self.caches: dict[str, torch.Tensor] = {}
        self.waited: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.under_way: dict[str, list[list[Piece]]] = {}
        self.failed_blocks: set[int] = set()
        self.failed_requests: set[str] = set()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return True  # the hooks of a layer would not run in a replayed graph

    # The scheduler's.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        tokens = list(request.all_token_ids)
        self.found.pop(request.request_id, None)
        if self._kv_transfer_config.is_kv_consumer:
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
        if not num_external_tokens:
            self.found.pop(request.request_id, None)

    def build_connector_meta(self, scheduler_output: Any) -> Step:
        scheduled = scheduler_output.num_scheduled_tokens
        step = Step(computes=bool(scheduled))
        for request, found in self.found.items():
            pieces = step.arriving if self.asynchronous else step.loads
            pieces += self.to_load(self.requests[request], *found)
        self.found.clear()
        if self._kv_transfer_config.is_kv_producer:
            cached = scheduler_output.scheduled_cached_reqs
            before = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
            before |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            for request, tokens in scheduled.items():
                step.saves += self.to_save(self.requests[request], before[request] + tokens)
        return step

    def to_load(self, request: Any, here: int, hit: int, prompt: list[int]) -> Iterator[Piece]:
        for layer in self.layers.values():
            # The next token sees one token fewer of a window than the window has: itself is in it.
            first = max(here, layer.last(hit + 1))
            for index, key in layer.pages(prompt, first, hit):
                yield self.piece(request, layer, index, key, first, hit)

    def to_save(self, request: Any, computed: int) -> Iterator[Piece]:
        prompt = request.prompt_token_ids
        for layer in self.layers.values():
            if layer.window and computed < len(prompt):
                continue
            first = layer.last(len(prompt))
            for index, key in layer.pages(prompt, first, len(prompt)):
                is_full = computed >= min((index + 1) * layer.block, len(prompt))
                if is_full and key not in self.store.pages:
                    yield self.piece(request, layer, index, key, first, len(prompt))

    def piece(self, request: Any, layer: Layer, index: int, key: tuple, first: int, end: int) -> Piece:
        block = self._kv_cache_manager.get_block_ids(request.request_id)[layer.group][index]
        start = index * layer.block
        first, end = max(first, start), min(end, start + layer.block)
        if block == 0:
            raise WrongHook(f"tokens {first} to {end} of {layer.name} have no block")
        prompt = tuple(request.prompt_token_ids)
        return Piece(request.request_id, prompt, layer.name, block, start, first, end, key)

    def request_finished_all_groups(self, request: Any, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        self.requests.pop(request.request_id, None)
        self.found.pop(request.request_id, None)
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
        self.failed_requests.clear()

    def here(self, piece: Piece) -> torch.Tensor:
        """(K, tokens, 2 · d) of the engine's memory."""
        return self.caches[piece.layer][piece.block, :, piece.slots]

    def load(self, piece: Piece) -> None:
        first, stored = self.store.pages[piece.key]
        wanted = stored[:, piece.first - first : piece.end - first]
        self.here(piece).copy_(wanted)
        self.store.loaded[piece.prompt] += wanted.nbytes
        self.store.counts["loaded_bytes"] += wanted.nbytes

    def fails(self) -> bool:
        """Whether the load that begins now will fail."""
        self.store.counts["loads"] += 1
        failing = self.store.failures > 0
        self.store.failures -= failing
        self.store.counts["failed_loads"] += failing
        return failing

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        step = self.step
        for piece in (*step.loads, *step.arriving):
            self.here(piece).fill_(float("nan"))
        for request in {piece.request for piece in step.loads}:
            if self.fails():
                self.failed_requests.add(request)
        for request, pieces in by_request(step.arriving).items():
            half = ceil(len(pieces) / 2)
            halves = [pieces[:half], pieces[half:]]
            self.under_way[request] = [halves[0], None] if self.fails() else halves

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.waited[layer_name] += 1
        if self.waited[layer_name] > 1:
            raise WrongHook(f"{layer_name} is waited for twice in a step")
        half = len(self.layers) // 2
        breaks_off = list(self.layers).index(layer_name) >= half
        for piece in self.step.loads:
            if piece.layer == layer_name:
                if breaks_off and piece.request in self.failed_requests:
                    self.failed_blocks.add(piece.block)
                else:
                    self.load(piece)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        self.written[layer_name] += 1
        if self.written[layer_name] > 1 or not self.waited[layer_name]:
            raise WrongHook(f"{layer_name} is saved twice in a step, or before it is waited for")
        if kv_layer.data_ptr() != self.caches[layer_name].data_ptr():
            raise WrongHook(f"{layer_name} is saved from other memory than it was registered with")
        for piece in self.step.saves:
            if piece.layer != layer_name or piece.request in self.failed_requests or piece.key in self.store.pages:
                continue
            page = self.here(piece).clone()
            if page.isnan().any():
                raise WrongHook(f"{layer_name} is saved with what was never loaded or written")
            self.store.pages[piece.key] = (piece.first, page)
            self.store.saved[piece.prompt] += page.nbytes
            self.store.counts["saved_bytes"] += page.nbytes

    def wait_for_save(self) -> None:
        for hook, called in (("waited for", self.waited), ("saved", self.written)):
            missing = set(self.layers) - set(called)
            if missing and self.step.computes:
                raise WrongHook(f"{sorted(missing)} are not {hook} in a step with a forward pass")
            if called and not self.step.computes:
                raise WrongHook(f"{sorted(called)} are {hook} in a step without a forward pass")

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults()
        for request in list(self.under_way):
            half = self.under_way[request].pop(0)
            for piece in half or ():
                self.load(piece)
            if half is None:
                results.failed_recving.add(request)
            if half is None or not self.under_way[request]:
                results.finished_recving.add(request)
                del self.under_way[request]
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        return set(self.failed_blocks)


def by_request(pieces: list[Piece]) -> dict[str, list[Piece]]:
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.request, []).append(piece)
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
