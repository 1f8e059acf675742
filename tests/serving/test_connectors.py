"""vLLM's KV connectors over caches that share blocks: what each moves, and which are refused.

Offloading runs, with copies on the host in the place of a GPU's. Of NIXL and Mooncake, the code that computes addresses
runs over the caches of an engine, in both layouts, without their libraries.
"""

import copy
import os
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import pytest
import torch
from harness import offloading, tiny
from harness.engines import generate, kv_cache_config
from harness.offloading import MULTI, NATIVE, SIMPLE
from harness.oracle import agrees
from vllm import envs
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.platforms import current_platform

from vllm_yocou.serving import connectors
from vllm_yocou.serving.cache_specs import WindowCacheSpec
from vllm_yocou.serving.connectors import check_connectors, check_offloading

CONNECTORS = {"native": NATIVE, "simple": SIMPLE, "multi": MULTI}
ON_CPU = "cannot be used on a CPU: it copies between a GPU and other memory"
# Of all that vLLM registers, those that are not refused on a GPU; each was read, and docs/support.md says which ran.
READ = {
    "DecodeBenchConnector",
    "ExampleConnector",
    "ExampleHiddenStatesConnector",
    "HiSparseConnector",
    "MultiConnector",
    *connectors.NIXL,
    *connectors.OF_GPUS,
}


def settings(
    connector: str, ranks: int = 1, chunked: bool = True, executor: str | None = None, **transfer
) -> SimpleNamespace:
    chosen = KVTransferConfig(kv_connector=connector, kv_role="kv_both", **transfer)
    return SimpleNamespace(
        kv_transfer_config=chosen,
        scheduler_config=SimpleNamespace(enable_chunked_prefill=chunked),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, distributed_executor_backend=executor),
    )


@pytest.mark.parametrize(
    "asked, sentence",
    [
        (settings("LMCacheConnectorV1"), "LMCacheConnectorV1 cannot be used with YOCO-U: it expects one cache for"),
        (settings("MoRIIOConnector"), "MoRIIOConnector cannot be used with YOCO-U: it expects pages of one length"),
        (settings("OffloadingConnector"), f"OffloadingConnector {ON_CPU}"),
        (settings("SimpleCPUOffloadConnector"), f"SimpleCPUOffloadConnector {ON_CPU}"),
        (settings("MooncakeConnector"), f"MooncakeConnector {ON_CPU}"),
        (settings("ExampleConnector"), "ExampleConnector cannot be used with prompts in chunks"),
        (settings("NixlConnector", ranks=2), "NixlConnector cannot be used with --tensor-parallel-size 2 on a CPU"),
        (settings("MultiConnector", kv_connector_extra_config={"connectors": [NATIVE, SIMPLE]}), f"Simple.* {ON_CPU}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_connectors_that_cannot_be_right_are_refused(asked, sentence):
    with pytest.raises(ValueError, match=rf"^the KV connector {sentence}.*, \S.*\.$"):
        check_connectors(asked)


def test_a_server_on_a_cpu_cannot_use_the_example_of_a_connector(monkeypatch):
    """Its worker is a process of its own, where the connector would take 128 tokens for a block of any size."""
    asked = settings("ExampleConnector")
    asked.scheduler_config.enable_chunked_prefill = False
    check_connectors(asked)
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="ExampleConnector cannot be used by workers that are processes of their own"):
        check_connectors(asked)


@pytest.mark.parametrize("name", ["ExampleConnector", "HF3FSKVConnector"])
def test_workers_that_do_not_know_the_block_size_are_refused_on_gpus(name, monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    check_connectors(settings(name, chunked=False))
    for asked in (dict(ranks=2), dict(executor="mp"), dict(executor="ray")):
        with pytest.raises(ValueError, match=f"{name} cannot be used by workers .*, start one rank"):
            check_connectors(settings(name, chunked=False, **asked))


@pytest.mark.parametrize(
    "asked, sentence",
    [
        (settings("NixlConnector", kv_buffer_device="cpu"), 'cannot be used with "kv_buffer_device": "cpu"'),
        (settings("NixlPushConnector", ranks=2, kv_buffer_device="cuda"), "cannot be used with VLLM_KV_CACHE_LAYOUT"),
    ],
    ids=["host-buffer", "layout"],
)
def test_settings_of_nixl_that_cannot_be_right_on_a_gpu_are_refused(asked, sentence, monkeypatch):
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "BLHNC")
    with pytest.raises(ValueError, match=sentence):
        check_connectors(asked)
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT")
    asked.kv_transfer_config.kv_buffer_device = "cuda"
    check_connectors(asked)


def test_every_connector_of_vllms_was_read(monkeypatch):
    assert set(KVConnectorFactory._registry) == READ | set(connectors.WRONG)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    for name in READ:
        check_connectors(settings(name, chunked=False, kv_buffer_device="cuda"))


def test_a_connector_from_elsewhere_is_not_refused():
    check_connectors(settings("LMCacheConnectorV1", kv_connector_module_path="somewhere.else"))
    check_connectors(settings("OffloadingConnector", kv_connector_extra_config={"spec_name": "HostSpec"}))


def test_offloading_by_size_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match=rf"^--kv-offloading-size {ON_CPU}"):
        check_offloading(SimpleNamespace(cache_config=SimpleNamespace(kv_offloading_size=1.0)))
    check_offloading(SimpleNamespace(cache_config=SimpleNamespace(kv_offloading_size=None)))


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.config(**offloading.SHAPE))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def offloading_engine(request, checkpoint, module_engine):
    """Of one engine at a time: vLLM keeps one connector a process."""
    with pytest.MonkeyPatch.context() as patched:
        offloading.copy_on_host(patched)
        with patch.object(connectors, "OF_GPUS", ()):
            llm = module_engine(checkpoint, kv_transfer_config=CONNECTORS[request.param], **offloading.SETTINGS)
        yield llm
        module_engine.stop()


def by(*names: str):
    """Runs with engines of these CONNECTORS; of the rest only every night."""
    marked = [pytest.param(name, marks=[] if name == "native" else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("offloading_engine", marked, indirect=True)


@by("native", "simple", "multi")
def test_evicted_blocks_come_back(offloading_engine, model):
    prompts, outputs = zip(*offloading.ask_again(offloading_engine), strict=True)
    agrees(model, prompts, outputs)


@by("native")
def test_windows_before_the_last_are_not_offloaded(offloading_engine):
    """Of a prompt, the page of each window before its last whole global block, and all whole global blocks."""
    groups = kv_cache_config(offloading_engine).kv_cache_groups
    worker = get_kv_transfer_group().connector_worker.worker
    began, stored = len(worker.moves), [0] * len(groups)
    prompts = [tiny.prompt(length, seed=9) for length in (700, 333)]
    generate(offloading_engine, prompts, tokens=40)
    for move in worker.moves[began:]:
        stored[move.group] += len(move.blocks) * move.stored
    windows = [isinstance(group.kv_cache_spec, WindowCacheSpec) for group in groups]
    block = offloading.global_block(offloading_engine)
    everything = sum(len(prompt) // block for prompt in prompts)
    assert stored == [len(prompts) if window else everything for window in windows]


def pages(llm, layout: str) -> dict[str, torch.Tensor]:
    """The engine's own caches by name, (B, H, N, C), or views of the same pages in another layout."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    config = kv_cache_config(llm)
    names = [name for group in config.kv_cache_groups for name in group.layer_names]
    if layout == config.kv_cache_layout:
        return {name: context[name].kv_cache for name in names}
    assert (layout, config.kv_cache_layout) == ("BLNHC", "BLHNC")
    swapped = {}
    for name in names:
        cache = context[name].kv_cache
        _, heads, _, content = cache.shape
        strides = cache.stride(0), content, heads * content, 1
        swapped[name] = cache.as_strided(cache.shape, strides, cache.storage_offset())
    return swapped


def nixl_regions(llm, layout: str, monkeypatch) -> list[tuple[int, int, int, int]]:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

    agent = MagicMock()
    agent.return_value.get_agent_metadata.return_value = b""
    monkeypatch.setattr(base_worker, "NixlWrapper", agent)
    monkeypatch.setattr(base_worker, "nixl_agent_config", MagicMock())
    monkeypatch.setattr(os, "sched_setaffinity", lambda *arguments: None)  # it would keep one core to itself
    settings = copy.copy(llm.llm_engine.vllm_config)
    settings.kv_transfer_config = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both")
    settings.cache_config = copy.copy(settings.cache_config)
    settings.cache_config.kv_cache_layout = layout
    worker = NixlPullConnectorWorker(settings, "here", kv_cache_config(llm))
    worker.register_kv_caches(pages(llm, layout))
    assert worker.num_blocks == kv_cache_config(llm).num_blocks
    bases = worker.kv_caches_base_addr["here"][0]
    return list(
        zip(bases, worker.block_len_per_layer, worker.block_stride_per_layer, worker.region_group_ids, strict=True)
    )


def mooncake_regions(llm, layout: str, monkeypatch) -> list[tuple[int, int, int, int]]:
    from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.mooncake_connector import MooncakeConnectorWorker

    class Worker(MooncakeConnectorWorker):
        """Its start would ask for a GPU; what is not set below is not looked at."""

        def __init__(self):
            pass

        def __getattr__(self, name: str) -> MagicMock:
            return MagicMock()

    config, worker = kv_cache_config(llm), Worker()
    worker.kv_cache_config, worker.use_mla, worker.is_kv_consumer = config, False, True
    worker._physical_blocks_per_logical_kv_block = 1
    worker._layer_specs = {name: group.kv_cache_spec for group in config.kv_cache_groups for name in group.layer_names}
    worker.engine = SimpleNamespace(batch_register_memory=lambda addresses, lengths: 0)
    worker.register_kv_caches(pages(llm, layout))
    return list(
        zip(
            worker.kv_caches_base_addr,
            worker.kv_block_len_per_layer,
            worker.block_len_per_layer,
            worker.registered_group_indices,
            strict=True,
        )
    )


def mooncake_store_regions(llm, layout: str, monkeypatch) -> list[tuple[int, int, int, int]]:
    from vllm.distributed.kv_transfer.kv_connector.v1.mooncake.store.data import RankLocalStoreLayout

    stored = RankLocalStoreLayout(MagicMock(), block_size=32, hash_block_size=32)
    stored.register_kv_caches(list(pages(llm, layout).values()), kv_cache_config(llm).num_blocks)
    whole = zip(stored.kv_caches_base_addr, stored.block_len, strict=True)
    return [(base, length, length, -1) for base, length in whole]


@by("native")
@pytest.mark.parametrize("layout", ["BLHNC", "BLNHC"])
@pytest.mark.parametrize("regions", [nixl_regions, mooncake_regions, mooncake_store_regions])
def test_what_is_sent_of_a_block_is_whole_pages_of_its_group(regions, layout, offloading_engine, monkeypatch):
    """A block belongs to one group; of its bytes, those of the group's caches go out, and none of another block's."""
    config, caches = kv_cache_config(offloading_engine), pages(offloading_engine, layout)
    found = regions(offloading_engine, layout, monkeypatch)
    (pool,) = {cache.untyped_storage().data_ptr() for cache in caches.values()}
    for block in (1, config.num_blocks - 1):
        for index, group in enumerate(config.kv_cache_groups):
            sent = {
                byte
                for base, length, stride, of_group in found
                if of_group in (index, -1)  # vLLM's mark of a region that groups share
                for byte in range(base + block * stride - pool, base + block * stride - pool + length)
            }
            first_byte, last_byte = (number * config.kv_cache_tensors[0].block_stride for number in (block, block + 1))
            wanted = set()
            for name in group.layer_names:
                start = caches[name][block].data_ptr() - pool
                wanted |= set(range(start, start + group.kv_cache_spec.page_size_bytes))
            assert wanted <= sent <= set(range(first_byte, last_byte))
