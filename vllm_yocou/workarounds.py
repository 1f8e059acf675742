"""Every workaround of a fault of vLLM's own stands here, with the faulty versions; remove it after the last of them.

`FAULTY_IN` names them; tests/test_workarounds.py shows each fault in the versions that have it.
"""

import inspect
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm import SamplingParams
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.cache import CacheDType
    from vllm.lora.punica_wrapper import PunicaWrapperBase
    from vllm.model_executor.layers.fused_moe import MoERunner
    from vllm.v1.attention.backend import AttentionBackend

logger = logging.getLogger("vllm.plugins.yocou")

# The supported versions of vLLM that have the fault.
FAULTY_IN = {
    "loading_of_saved_code": ("0.32", "0.33"),
    "spare_rows_without_adapter": ("0.32",),
    "refuse_seed": ("0.32", "0.33"),
    "warn_of_seed": ("0.32", "0.33"),
    "check_cache_dtype": ("0.32",),
    "widen_decode_scratch": ("0.32", "0.33"),
    "pack_router_scores": ("0.32", "0.33"),
    "refuse_expert_parallel": ("0.32", "0.33"),
    "exchange_rows_on_cpu": ("0.32", "0.33"),
    "refuse_int8_in_float32": ("0.32", "0.33"),
    "refuse_fp8_by_a_given_scale": ("0.32", "0.33"),
    "refuse_engines_without_memory_node": ("0.33",),
    "fill_spec_registry": ("0.32", "0.33"),
    "as_float_factor": ("0.32", "0.33"),
    "pack_experts_again": ("0.32", "0.33"),
    "scales_kept": ("0.32", "0.33"),
    "without_overrides_for_gpus": ("0.32", "0.33"),
}


@contextmanager
def loading_of_saved_code() -> Iterator[None]:
    """While a unit is compiled or loaded for the first time, let vLLM load what it saved on a CPU.

    vLLM asks all compiled code to finish loading, and only the code of its own compiler backend can. In the mode that a
    CPU has, vLLM would refuse what it saved and compile it again at every start.
    """
    import torch

    load = torch.compiler.load_compiled_function

    def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        code = loaded._artifacts.compiled_fn  # type: ignore[attr-defined]  # as vLLM reads it
        if not hasattr(code, "finalize_loading"):
            code.finalize_loading = lambda vllm_config: None
        return loaded

    with patch.object(torch.compiler, "load_compiled_function", load_compiled_function):
        yield


def spare_rows_without_adapter(wrapper: "PunicaWrapperBase") -> None:
    """On a CPU, keep LoRA adapters away from rows that have none.

    vLLM marks such rows with -1, which its CPU operators take for the last adapter slot (vllm-project/vllm#48421).
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    if not isinstance(wrapper, PunicaWrapperCPU):
        return
    add_to_all_rows = wrapper.add_lora_linear

    def add_lora_linear(y_NX: "torch.Tensor", x_NX: "torch.Tensor", *args: Any, **kwargs: Any) -> None:
        without_N = wrapper.token_lora_indices < 0
        base_LX = y_NX[without_N]
        add_to_all_rows(y_NX, x_NX, *args, **kwargs)
        y_NX[without_N] = base_LX

    wrapper.add_lora_linear = add_lora_linear  # type: ignore[method-assign, assignment]  # of this one object


def refuse_seed(params: "SamplingParams") -> None:
    """Refuse a request with a seed on a CPU, before it ends the engine and every other request with it.

    Where a chunk does not end its prompt, vLLM's V1 runner turns the request's generator back, which the generators of
    a CPU cannot do.

    Raises:
        VLLMValidationError: the request samples with a seed of its own.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingType

    if params.sampling_type is SamplingType.RANDOM_SEED and current_platform.is_cpu():
        raise VLLMValidationError(
            "seed cannot be used with YOCO-U on vLLM's CPU runner: a prompt computed in chunks would end the "
            "engine, leave it out or set temperature to 0.",
            parameter="seed",
            value=params.seed,
        )


def warn_of_seed(vllm_config: "VllmConfig") -> None:
    """Say what `refuse_seed` cannot refuse: under speculative decoding vLLM's V1 runner asks nobody about a request."""
    from vllm.platforms import current_platform

    speculates = vllm_config.speculative_config is not None
    if speculates and not vllm_config.use_v2_model_runner and current_platform.is_cpu():
        logger.warning(
            "A request with a seed and temperature above 0 ends vLLM's CPU engine if its prompt takes several "
            "chunks, and is not refused under speculative decoding: leave the seed out."
        )


def check_cache_dtype(backend: "type[AttentionBackend]", cache_dtype: "CacheDType") -> None:
    """Refuse a KV cache dtype that the backend's kernels do not read.

    vLLM's CPU platform does not ask, and its kernels would read such a cache as something else.

    Raises:
        ValueError: the dtype is not among the backend's.
    """
    if not backend.supports_kv_cache_dtype(cache_dtype):
        raise ValueError(
            f"--kv-cache-dtype {cache_dtype} cannot be used with the attention backend {backend.get_name()}: its "
            f"kernels read {', '.join(backend.supported_kv_cache_dtypes)}, choose one of these."
        )


def widen_decode_scratch(builder: Any, head_size: int) -> None:
    """Make room for the partial results of Triton's decode kernel, as wide as a padded head of the builder's cache.

    vLLM makes room for heads of the model's `head_dim` in every layer, and the kernel writes past it in a layer of
    wider heads. Seen on an H100 with `cross_head_dim` twice `head_dim`: log probabilities off by 2.9.

    Args:
        builder: a metadata builder; those of other backends have no such scratch.
        head_size: of the cache that it builds for.
    """
    from vllm.utils.math_utils import next_power_of_2

    scratch, width = getattr(builder, "softmax_segm_output", None), next_power_of_2(head_size)
    if scratch is not None and scratch.shape[-1] < width:
        builder.softmax_segm_output = scratch.new_empty(*scratch.shape[:-1], width)


def pack_router_scores(vllm_config: "VllmConfig") -> None:
    """Keep compiled code from spacing out the rows of the router's scores, which vLLM's top-k kernel on GPUs ignores.

    Where the number of experts is no multiple of 8, torch's compiler may multiply by a wider matrix, if it measures
    that to be faster, and hand on a view of the product. The kernel then reads other scores for all rows but the first
    (vllm-project/vllm#56900). Seen on an H200 with 5 and 6 experts, in about every second start: log probabilities off
    by up to 4. What latent experts read is such a product, too, and vLLM's kernels take it only if nothing lies between
    its rows.
    """
    config = vllm_config.model_config.hf_config
    if config.is_moe and (config.num_experts % 8 or (config.moe_latent_size or 0) % 8):
        vllm_config.compilation_config.inductor_compile_config["shape_padding"] = False


def refuse_expert_parallel(vllm_config: "VllmConfig") -> None:
    """Refuse expert parallelism on a CPU for experts that the plugin does not compute there itself.

    vLLM's CPU experts say that they support it, and then compute the tokens of other ranks' experts as well. Those that
    are not quantized are computed by a loop of the plugin's own (serving/looped_experts.py).

    Raises:
        ValueError: it is asked for, for quantized experts.
    """
    from vllm.platforms import current_platform

    asked = vllm_config.parallel_config.enable_expert_parallel and current_platform.is_cpu()
    if asked and vllm_config.model_config.quantization is not None:
        raise ValueError(
            "--enable-expert-parallel cannot be used on a CPU with quantized weights: vLLM's CPU kernels do not pass "
            "over tokens of other ranks' experts, leave the flag out."
        )


def exchange_rows_on_cpu(runner: "MoERunner") -> None:
    """On a CPU, let data-parallel ranks that share experts exchange rows.

    vLLM's communicator there lacks the two operations by which its ranks gather each other's rows and sum what their
    experts made of them. And its layer of experts is no operator there, so that compiled code would keep the numbers of
    rows of the first step.

    Args:
        runner: a layer of experts.
    """
    import torch
    from vllm.distributed import get_dp_group
    from vllm.platforms import current_platform

    if runner.moe_config.dp_size == 1 or not current_platform.is_cpu():
        return
    shared = runner.shared_experts is not None
    runner._forward_entry = torch.ops.vllm.moe_forward_shared if shared else torch.ops.vllm.moe_forward
    ranks = get_dp_group()
    communicator: Any = ranks.device_communicator

    def own_rows(sizes: list[int]) -> slice:
        first = sum(sizes[: ranks.rank_in_group])
        return slice(first, first + sizes[ranks.rank_in_group])

    def gathered(own_NX: "torch.Tensor", sizes: list[int]) -> "torch.Tensor":
        all_RX = own_NX.new_zeros(sum(sizes), *own_NX.shape[1:])
        all_RX[own_rows(sizes)] = own_NX
        return communicator.all_reduce(all_RX)

    def all_gatherv(input_: Any, dim: int, sizes: list[int]) -> Any:
        assert dim == 0
        return [gathered(x, sizes) for x in input_] if isinstance(input_, list) else gathered(input_, sizes)

    def reduce_scatterv(input_: "torch.Tensor", dim: int, sizes: list[int]) -> "torch.Tensor":
        assert dim == 0
        return communicator.all_reduce(input_.contiguous())[own_rows(sizes)]

    communicator.all_gatherv, communicator.reduce_scatterv = all_gatherv, reduce_scatterv


def refuse_int8_in_float32(vllm_config: "VllmConfig", shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuse int8 activations in float32 on a processor with AMX, before they end the engine in its first step.

    vLLM takes its AMX kernel for every matrix whose sizes tiles divide, and that kernel knows half precision alone.

    Args:
        shapes: (out, in) of the matrices.

    Raises:
        ValueError: the kernel would be given float32.
    """
    import torch
    from vllm.platforms import current_platform

    model_config = vllm_config.model_config
    activations = _activations(_stored_quantization(model_config))
    int8 = any(it.get("type") == "int" and it.get("num_bits") == 8 for it in activations)
    if not int8 or model_config.dtype != torch.float32 or not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel  # a name that no GPU needs

    if any(check_cpu_sgl_kernel(shape[0], shape[1], torch.int8) for shape in shapes):
        raise ValueError(
            "--dtype float32 cannot be used with a W8A8 checkpoint on a processor with AMX: vLLM's kernel for it takes "
            "half precision alone, use --dtype bfloat16."
        )


def refuse_fp8_by_a_given_scale(vllm_config: "VllmConfig") -> None:
    """Refuse what rounds to FP8 by a scale that is there already, on a CPU, before it ends in a C++ signature.

    vLLM's build for CPUs has the names of these kernels without their arguments. It needs them for weights with one
    scale a matrix, which it rounds once more where it fuses matrices, for activations with a scale of the
    checkpoint's, and for experts.

    Raises:
        ValueError: the kernel would be called.
    """
    from vllm.platforms import current_platform

    model_config, method = vllm_config.model_config, vllm_config.model_config.quantization
    if method is None or not current_platform.is_cpu():
        return
    stored = _stored_quantization(model_config)
    activations = _activations(stored)
    given = any(it.get("type") == "float" and it.get("num_bits") == 8 and not it.get("dynamic") for it in activations)
    if given or (method == "fp8" and stored and not stored.get("weight_block_size")):
        refused = "a checkpoint of FP8 with one scale for a matrix or for all activations"
        remedy = "quantize it with a scale for each row of a matrix and dynamic ones for activations"
    elif method in ("fp8", "fp8_per_tensor", "fp8_per_channel") and not stored and model_config.hf_config.is_moe:
        refused, remedy = f"--quantization {method} with a mixture of experts", "leave it out"
    elif method in ("fp8", "fp8_per_tensor") and not stored:
        refused, remedy = f"--quantization {method}", "use fp8_per_channel"
    else:
        return
    raise ValueError(f"{refused} cannot be used on a CPU: vLLM has no kernel for it there, {remedy}.")


def _stored_quantization(model_config: "ModelConfig") -> dict[str, Any]:
    """How the checkpoint says that it is quantized; empty for one that is not."""
    return getattr(model_config.hf_config, "quantization_config", None) or {}


def _activations(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each group of matrices of compressed-tensors, how activations are quantized; empty where they are not."""
    return [group.get("input_activations") or {} for group in stored.get("config_groups", {}).values()]


def refuse_engines_without_memory_node(vllm_config: "VllmConfig") -> None:
    """Refuse more engines on a CPU than the machine has NUMA nodes, before they end in an assertion.

    vLLM 0.33 gives the n-th worker the n-th node, and ends one whose node is not there. The variable that the sentence
    names lets workers share a node; vLLM takes it only where it binds threads by itself.

    Raises:
        ValueError: an engine would have no memory node.
    """
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    several_on_a_cpu = parallel.data_parallel_size_local > 1 and current_platform.is_cpu()
    if not several_on_a_cpu or sys.platform != "linux" or "VLLM_CPU_SIM_MULTI_NUMA" in os.environ:
        return
    from vllm.utils.cpu_resource_utils import get_memory_affinity, get_visible_memory_node

    if "assigned_node_ids" not in inspect.signature(get_visible_memory_node).parameters:
        return
    workers, nodes = parallel.data_parallel_size_local * parallel.world_size, get_memory_affinity()
    if not set(range(workers)) <= set(nodes):
        bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") != "auto"
        raise ValueError(
            f"--data-parallel-size {parallel.data_parallel_size} cannot be used on a CPU with {len(nodes)} NUMA "
            f"{'node' if len(nodes) == 1 else 'nodes'} as it is: this vLLM looks for a node for each worker, set the "
            f"environment variable VLLM_CPU_SIM_MULTI_NUMA=1{' and unset VLLM_CPU_OMP_THREADS_BIND' if bound else ''}."
        )


def fill_spec_registry() -> None:
    """Let vLLM register its own KV cache specs, before the first one of a plugin.

    vLLM does so only while its registry is empty: with a plugin's spec in it, its own would be missing.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()


def as_float_factor(rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings of type linear with a float for a factor; vLLM takes a whole number for a list of factors."""
    return rope_parameters | {"factor": float(rope_parameters["factor"])}


def pack_experts_again(layer: "nn.Module") -> None:
    """On a CPU, let experts whose weights are about to be loaded once more be packed as at their first load.

    vLLM packs them only while their kernel is not built, and would copy a matrix as it was loaded over a packed one.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.platforms import current_platform

    for module in layer.modules():
        if isinstance(module, RoutedExperts) and current_platform.is_cpu():
            module.quant_method.moe_kernel = None


@contextmanager
def scales_kept() -> Iterator[None]:
    """While weights are loaded into a running engine on a CPU, keep the scales of int8 matrices in memory.

    vLLM's kernel points to the scales that it is made of, and a reload moves them elsewhere and frees them.
    """
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield
        return
    create = ops.create_onednn_scaled_mm

    def create_onednn_scaled_mm(weight: "torch.Tensor", weight_scales: "torch.Tensor", *args: Any) -> Any:
        handler = create(weight, weight_scales, *args)
        handler.weight_scales = weight_scales  # type: ignore[attr-defined]  # as long as the kernel itself
        return handler

    with patch.object(ops, "create_onednn_scaled_mm", create_onednn_scaled_mm):
        yield


@contextmanager
def without_overrides_for_gpus() -> Iterator[None]:
    """While a worker of a CPU starts with VLLM_BATCH_INVARIANT, keep vLLM from replacing torch's operators.

    What it puts in their place for every device are Triton kernels, and the first mean ends in a TypeError.
    """
    from vllm.model_executor.determinism import batch_invariant

    with patch.object(batch_invariant, "init_batch_invariance", lambda: None):
        yield
