"""Refuses KV connectors that would move the wrong bytes of caches that share blocks, or that need a GPU on a CPU.

The others move whole blocks, or address a page by the strides of its cache. A connector from elsewhere is not refused:
docs/kv-connectors.md says what it must do.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig

NIXL = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")
# They copy between a GPU and something else.
OF_GPUS = (
    "FlexKVConnectorV1",
    "HF3FSKVConnector",
    "LMCacheMPConnector",
    "MooncakeConnector",
    "MooncakeStoreConnector",
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
)
# What OffloadingConnector copies with, by vLLM's names; others are classes of the user's.
OFFLOADING_SPECS = ("CPUOffloadingSpec", "TieringOffloadingSpec")
# Their workers read the block size of the settings, which vLLM corrects in its scheduler's process alone.
BY_SETTINGS = ("ExampleConnector", "HF3FSKVConnector")
WRONG = {
    "LMCacheConnectorV1": "it expects one cache for each layer, use LMCacheMPConnector",
    "MoRIIOConnector": "it expects pages of one length in all caches, use NixlConnector",
}


def check_connectors(vllm_config: "VllmConfig") -> None:
    if vllm_config.kv_transfer_config is None:
        return
    for connector in parts(vllm_config.kv_transfer_config):
        if (reason := why_refused(connector, vllm_config)) is not None:
            raise ValueError(f"the KV connector {connector.kv_connector} cannot be used {reason}.")


def check_offloading(vllm_config: "VllmConfig") -> None:
    """--kv-offloading-size chooses a connector, but only after settings are checked."""
    from vllm.platforms import current_platform

    if vllm_config.cache_config.kv_offloading_size is not None and current_platform.is_cpu():
        raise ValueError(
            "--kv-offloading-size cannot be used on a CPU: it copies between a GPU and other memory, leave it out."
        )


def parts(chosen: "KVTransferConfig") -> "Iterator[KVTransferConfig]":
    """The connectors of the engine that vLLM brings: the chosen one, or what a MultiConnector is made of."""
    from vllm.config import KVTransferConfig

    if chosen.kv_connector == "MultiConnector":
        for part in chosen.kv_connector_extra_config.get("connectors", []):
            yield from parts(KVTransferConfig(**part))
    elif chosen.kv_connector_module_path is None:
        yield chosen


def why_refused(connector: "KVTransferConfig", vllm_config: "VllmConfig") -> str | None:
    """The end of a sentence: with what it cannot be used, why, and what to do. None if it is not refused."""
    from vllm import envs
    from vllm.platforms import current_platform

    name, extra = connector.kv_connector, connector.kv_connector_extra_config
    if name in WRONG:
        return f"with YOCO-U: {WRONG[name]}"
    own_copies = name == "OffloadingConnector" and extra.get("spec_name", OFFLOADING_SPECS[0]) not in OFFLOADING_SPECS
    if name in OF_GPUS and current_platform.is_cpu() and not own_copies:
        return "on a CPU: it copies between a GPU and other memory, leave it out"
    if name == "ExampleConnector" and vllm_config.scheduler_config.enable_chunked_prefill:
        return "with prompts in chunks: it saves a prompt in its first step, use --no-enable-chunked-prefill"
    parallel = vllm_config.parallel_config
    of_executor = parallel.tensor_parallel_size > 1 or parallel.distributed_executor_backend in ("mp", "ray")
    own_process = of_executor or (current_platform.is_cpu() and envs.VLLM_ENABLE_V1_MULTIPROCESSING)
    if name in BY_SETTINGS and own_process:
        remedy = "use it offline with VLLM_ENABLE_V1_MULTIPROCESSING=0"
        if of_executor:
            remedy = "start one rank and leave out --distributed-executor-backend"
        return f"by workers that are processes of their own: vLLM does not tell them the caches' block size, {remedy}"
    return _why_refused_of_nixl(connector, vllm_config) if name in NIXL else None


def _why_refused_of_nixl(connector: "KVTransferConfig", vllm_config: "VllmConfig") -> str | None:
    """NIXL joins caches that begin at the same address into one region, as long as the first of them.

    That is the global cache (`GlobalCache`), so a region holds whole blocks. For another server whose tensor parallel
    size differs, NIXL takes a region for one page and splits it by heads. It refuses that where heads are not
    contiguous, as in BLNHC.
    """
    from vllm.platforms import current_platform

    on_cpu, ranks = current_platform.is_cpu(), vllm_config.parallel_config.tensor_parallel_size
    if connector.kv_buffer_device == "cpu" and not on_cpu:
        return (
            'with "kv_buffer_device": "cpu": vLLM would copy what other caches keep in a block over what it has '
            "received, leave the key out"
        )
    if ranks > 1 and on_cpu:
        return (
            f"with --tensor-parallel-size {ranks} on a CPU: a server of another size would get parts of wrong pages, "
            "start one rank"
        )
    if ranks > 1 and os.environ.get("VLLM_KV_CACHE_LAYOUT") == "BLHNC":
        return (
            "with VLLM_KV_CACHE_LAYOUT=BLHNC: a server of another tensor parallel size would get parts of wrong pages, "
            "leave the variable out"
        )
    return None
