"""Refuses engine settings that would make YOCO-U compute wrong results, before the engine starts, and adjusts some.

Three lists at the end say what is refused, what is adjusted and what is wired into vLLM, in that order. vLLM runs this
hook for YOCO-U models only, in the process that parses the command line.
"""

import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from vllm_yocou.options import Options
from vllm_yocou.seams.check import check_all, check_packing
from vllm_yocou.serving.batch_invariance import check_batch_invariance, choose_worker
from vllm_yocou.serving.chunk import choose_chunk
from vllm_yocou.serving.connectors import check_connectors, check_offloading
from vllm_yocou.workarounds import (
    pack_router_scores,
    refuse_engines_without_memory_node,
    refuse_expert_parallel,
    refuse_fp8_by_a_given_scale,
    refuse_int8_in_float32,
    warn_of_seed,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_yocou.config import YocoUConfig

# Those of vLLM's that guess from tokens alone, by a search or by a class of the user's.
SPECULATIVE_METHODS = ("ngram", "ngram_gpu", "suffix", "custom_class")
# Load formats in which vLLM copies tensors into a model without calling its `load_weights`.
NAMELESS = ("ipc_cache", "runai_streamer_sharded", "sharded_state", "tensorizer")
# Quantization of a plain checkpoint, and formats of vLLM's for loading one.
OF_EXPERTS = ("experts_int8", "int8_per_channel_weight_only", "nvfp4_per_token")
INTO_GPUS = ("fastsafetensors", "instanttensor")

logger = logging.getLogger("vllm.plugins.yocou")


def check_files(vllm_config: "VllmConfig") -> None:
    """The files of weights must be whole, where there are any."""
    from vllm_yocou.checkpoints.verify import check_files

    model_config = vllm_config.model_config
    # Random weights need no files, and those in object storage lie elsewhere.
    if vllm_config.load_config.load_format != "dummy" and not model_config.model_weights:
        check_files(Path(model_config.model))


def check_shards(vllm_config: "VllmConfig") -> None:
    """Ranks split heads and feed-forward.

    Experts are split over ranks whole where expert parallelism is on, otherwise each one's width, over data-parallel
    ranks too.
    """
    config = cast("YocoUConfig", vllm_config.model_config.hf_config)
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    config.check_ranks(ranks)
    split = {} if config.is_moe and not config.first_k_dense_replace else {"intermediate_size": ranks}
    if config.is_moe and not parallel.enable_expert_parallel:
        split["moe_intermediate_size"] = ranks * parallel.data_parallel_size
    if config.shared_expert_intermediate_size is not None:
        split["shared_expert_intermediate_size"] = ranks
    for key, parts in split.items():
        if getattr(config, key) % parts:
            raise ValueError(
                f"{key} {getattr(config, key)} is not divisible by the tensor parallel size {ranks}"
                f"{f' times the data parallel size {parts // ranks}' if parts > ranks else ''}: choose a size that "
                "divides it."
            )


def check_context_parallel(vllm_config: "VllmConfig") -> None:
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError(
            "context parallelism cannot be used with YOCO-U: its window caches are not sharded over positions, "
            "use --tensor-parallel-size."
        )


def check_speculation(vllm_config: "VllmConfig") -> None:
    """Drafts of any origin are exact, since the model checks them; layers that draft need caches of their own."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if speculative.method not in SPECULATIVE_METHODS:
        *names, last = map(repr, SPECULATIVE_METHODS)
        raise ValueError(
            f"speculative decoding by '{speculative.method}' cannot be used with YOCO-U: no draft model shares its "
            f"packed KV cache, use {', '.join(names)} or {last}, or leave it out."
        )
    if speculative.method == "ngram_gpu" and not vllm_config.use_v2_model_runner:
        raise ValueError(
            "speculative decoding by 'ngram_gpu' cannot be used with YOCO-U on vLLM's V1 runner, which a CPU always "
            "has: its search there needs a GPU and a compilation of its own, use 'ngram'."
        )


def check_fast_prefill(vllm_config: "VllmConfig") -> None:
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        raise ValueError(
            "--kv-sharing-fast-prefill cannot be used with YOCO-U: its cross-decoder has no KV-sharing layers in "
            "vLLM's sense, leave the flag out."
        )


def check_experts_on_cpu(vllm_config: "VllmConfig") -> None:
    """Refuse what vLLM supports for a mixture of experts on GPUs only."""
    from vllm.platforms import current_platform

    config = cast("YocoUConfig", vllm_config.model_config.hf_config)
    if not config.is_moe or not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    refuse_expert_parallel(vllm_config)
    key = "hidden_size" if config.moe_latent_size is None else "moe_latent_size"
    if getattr(config, key) % CPUUnquantizedExperts.output_alignment:
        raise ValueError(
            f"{key} {getattr(config, key)} cannot be used with a mixture of experts on a CPU: vLLM's experts take "
            f"multiples of {CPUUnquantizedExperts.output_alignment}, serve the model on a GPU."
        )
    if vllm_config.parallel_config.data_parallel_size > 1 and vllm_config.model_config.quantization is not None:
        raise ValueError(
            "--data-parallel-size cannot be used on a CPU with a quantized mixture of experts: that the ranks exchange "
            "rows rightly is known of experts that are not quantized, start one server for each engine."
        )
    if vllm_config.lora_config is not None:
        raise ValueError(
            "--enable-lora cannot be used with a mixture of experts on a CPU: vLLM computes experts with adapters in "
            "Triton, merge the adapter into the weights."
        )


def check_lora(vllm_config: "VllmConfig") -> None:
    import torch
    from vllm.platforms import current_platform

    single = vllm_config.model_config.dtype == torch.float32
    if vllm_config.lora_config is not None and single and not current_platform.is_cpu():
        raise ValueError(
            "--enable-lora cannot be used in float32 on a GPU: vLLM's kernels for adapters take 16 bits, use "
            "--dtype bfloat16."
        )


def check_routed_experts(vllm_config: "VllmConfig") -> None:
    if vllm_config.aux_output_config.enable_return_routed_experts:
        raise ValueError(
            "--enable-return-routed-experts cannot be used with YOCO-U: vLLM notes one choice for each stored layer "
            "and row, and here iterations choose anew and rows skip layers, leave the flag out."
        )


def check_int8(vllm_config: "VllmConfig") -> None:
    def matrices() -> Iterator[tuple[int, ...]]:
        """Listed only where somebody asks: a mixture has thousands."""
        from vllm_yocou.checkpoints.format import expected_shapes

        shapes = expected_shapes(cast("YocoUConfig", vllm_config.model_config.hf_config)).items()
        yield from (shape for name, shape in shapes if "layers." in name and len(shape) == 2)

    refuse_int8_in_float32(vllm_config, matrices())


def check_quantization(vllm_config: "VllmConfig") -> None:
    """vLLM would leave a dense model as it is without a word."""
    model_config = vllm_config.model_config
    if model_config.quantization in OF_EXPERTS and not model_config.hf_config.is_moe:
        raise ValueError(
            f"--quantization {model_config.quantization} cannot be used with this model: it quantizes experts alone "
            "and the model has none, use fp8_per_channel."
        )


def check_load_format(vllm_config: "VllmConfig") -> None:
    """Refuse loaders that ask a CPU for CUDA."""
    from vllm.platforms import current_platform

    load_format = vllm_config.load_config.load_format
    if load_format in INTO_GPUS and current_platform.is_cpu():
        raise ValueError(
            f"--load-format {load_format} cannot be used on a CPU: it reads files into the memory of a GPU, leave it "
            "out."
        )


def check_kernels(vllm_config: "VllmConfig") -> None:
    """The plugin's own kernels need Triton, and bypass what vLLM wraps around its attention ops."""
    from vllm import envs
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
    from vllm.triton_utils import HAS_TRITON

    if not Options.of(vllm_config.additional_config).kernels:
        return
    reasons = {
        "on this machine: vLLM finds no GPU that Triton compiles for": not HAS_TRITON,
        "with KV connectors: these load and save caches around vLLM's attention": vllm_config.kv_transfer_config,
        "with breakable CUDA graphs: kernels have no op at which these break": is_breakable_cudagraph_enabled(),
        "with VLLM_BATCH_INVARIANT=1: other requests decide which kernel computes a row": envs.VLLM_BATCH_INVARIANT,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f'the option "kernels" cannot be used {reason}, leave it out.')


def check_compilation_mode(vllm_config: "VllmConfig") -> None:
    from vllm.config import CompilationMode

    if vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE:
        raise ValueError(
            "compilation mode 1 cannot be used with YOCO-U: it would unroll the loop into one graph, use 3 or leave "
            "the mode out."
        )


def decide_gate_without_names(vllm_config: "VllmConfig") -> None:
    """Weights decide whether a shared expert is gated where the model sees their names, as with most load formats.

    Raises:
        ValueError: it does not see the names of stored weights. Random ones have no gate.
    """
    config, load_format = vllm_config.model_config.hf_config, vllm_config.load_config.load_format
    if not config.leaves_gate_to_weights:
        return
    if load_format == "dummy":
        config.shared_expert_gate = False
    if load_format in NAMELESS:
        raise ValueError(
            f"--load-format {load_format} cannot be used with a config.json that leaves shared_expert_gate to the "
            "weights: vLLM copies them without asking the model, set the key to true or false there or with "
            "--hf-overrides."
        )


def list_experts_by_call(vllm_config: "VllmConfig") -> None:
    """vLLM's list of expert layers, in the order of their calls, assumes one call per layer and step."""
    vllm_config.compilation_config.fast_moe_cold_start = False


def choose_clamping_experts(vllm_config: "VllmConfig") -> None:
    """On a GPU let vLLM's Triton kernels compute experts that clamp: its first choice may ignore the limit.

    A backend of the user's stays, and so does vLLM's choice for quantized experts; expert_kernels.py looks at both.
    """
    from vllm.platforms import current_platform

    config = vllm_config.model_config.hf_config
    clamps = config.is_moe and config.swiglu_limit is not None
    kernel_config = vllm_config.kernel_config
    if (
        clamps
        and current_platform.is_cuda()
        and vllm_config.model_config.quantization is None
        and kernel_config.moe_backend == "auto"
    ):
        kernel_config.moe_backend = "triton"


def choose_compilation(vllm_config: "VllmConfig") -> None:
    """vLLM compiles unless told not to, for which torch needs a C++ compiler on a CPU: without one, run eagerly.

    Raises:
        ValueError: the user asked for compilation.
    """
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    compilation = vllm_config.compilation_config
    eager = vllm_config.model_config.enforce_eager or compilation.mode == CompilationMode.NONE
    if eager or not current_platform.is_cpu() or (missing := _missing_compiler()) is None:
        return
    if compilation.mode is not None:
        raise ValueError(
            f"compilation mode {compilation.mode.value} cannot be used: {missing}, leave the mode out or give torch a "
            "C++ compiler (install g++ and Python's headers, unset the variable)."
        )
    compilation.mode = CompilationMode.NONE
    logger.info("The model runs eagerly, in about 1.3 times the time of a compiled one: %s.", missing)


def _missing_compiler() -> str | None:
    """What torch's compiler lacks on a CPU, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TORCHDYNAMO_DISABLE is set"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler here"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's header files are not here"
    return None


def expose_metrics(vllm_config: "VllmConfig") -> None:
    from vllm_yocou.rows import metrics

    metrics.expose(vllm_config)


def observe_requests(vllm_config: "VllmConfig") -> None:
    """Name the hook of vLLM's V1 runner; the model itself brings the V2 runner's."""
    from vllm_yocou.rows import v1_runner

    # vLLM refuses such classes everywhere else. With one, its V1 runner keeps output tokens for every request.
    takes_hooks = vllm_config.model_config.runner_type == "generate" and vllm_config.speculative_config is None
    if takes_hooks and not vllm_config.use_v2_model_runner:
        model_config = vllm_config.model_config
        model_config.logits_processors = [*(model_config.logits_processors or ()), v1_runner.NAME]


REFUSALS = (
    check_files,
    check_shards,
    check_context_parallel,
    check_speculation,
    check_fast_prefill,
    check_experts_on_cpu,
    check_lora,
    check_routed_experts,
    refuse_engines_without_memory_node,
    check_int8,
    refuse_fp8_by_a_given_scale,
    check_quantization,
    check_load_format,
    check_kernels,
    check_connectors,
    check_offloading,
    check_compilation_mode,
    check_batch_invariance,
    check_packing,
)
ADJUSTMENTS = (
    decide_gate_without_names,
    list_experts_by_call,
    choose_clamping_experts,
    pack_router_scores,
    choose_compilation,
    choose_chunk,
    choose_worker,
)
HOOKS = (expose_metrics, observe_requests, warn_of_seed)


class YocoUArchitecture(ModelArchConfigConvertorBase):
    """What vLLM makes of a YOCO-U config as soon as it is read: the first that a plugin hears of a model.

    Next, vLLM imports the model class in another process, where a name that is missing would end in a traceback.
    """

    def convert(self, *args: Any, **kwargs: Any) -> Any:
        check_all()
        return super().convert(*args, **kwargs)


class YocoUEngineSettings(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        check_all()  # once a process; a vLLM that no longer asks for the class above would come here first
        if model_config.disable_sliding_window:
            raise ValueError(
                "--disable-sliding-window cannot be used with YOCO-U: its self-decoder was trained with a window of a "
                "fixed size, leave the flag out."
            )
        model_config.hf_config.check()  # once more: overrides given as a function bypass YocoUConfig.update

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        for apply in (*REFUSALS, *ADJUSTMENTS, *HOOKS):
            apply(vllm_config)
