"""Seams where vLLM registers the plugin, configures an engine and takes requests."""

from vllm_yocou.seams import behaviour
from vllm_yocou.seams.seam import Seam

# Registration touches these and nothing else, and runs in every start of every model.
OF_REGISTRATION = (
    Seam("vllm.version:__version_tuple__", "registration refuses versions that are too old", "test_registration.py"),
    Seam(
        "vllm.model_executor.models.registry:ModelRegistry",
        "the architecture is registered by name",
        "test_registration.py",
        has="get_supported_archs register_model",
    ),
    Seam(
        "vllm.model_executor.models.config:MODELS_CONFIG_MAP",
        "the engine settings are checked and adjusted for this architecture",
        "serving/test_engine_settings.py",
    ),
    Seam(
        "vllm.model_executor.models.config:VerifyAndUpdateConfig",
        "the engine settings are checked and adjusted for this architecture",
        "serving/test_engine_settings.py",
        has="verify_and_update_config verify_and_update_model_config",
    ),
    Seam(
        "vllm.transformers_utils.model_arch_config_convertor:MODEL_ARCH_CONFIG_CONVERTORS",
        "this table is checked when a YOCO-U config is read, before its model class is imported",
        "seams/test_check.py",
    ),
    Seam(
        "vllm.transformers_utils.model_arch_config_convertor:ModelArchConfigConvertorBase",
        "this table is checked when a YOCO-U config is read, before its model class is imported",
        "seams/test_check.py",
        has="convert",
    ),
)

SETTINGS = (
    Seam(
        "vllm.config:VllmConfig",
        "settings are checked, and engines built from them",
        "serving/test_engine_settings.py",
        has=(
            "additional_config attention_config aux_output_config cache_config compilation_config instance_id "
            "kv_transfer_config kernel_config load_config lora_config max_concurrent_batches max_in_flight_tokens "
            "model_config num_speculative_tokens parallel_config performance_mode quant_config scheduler_config "
            "speculative_config use_v2_model_runner"
        ),
        mentions="MODELS_CONFIG_MAP verify_and_update_config",
    ),
    Seam(
        "vllm.config:ModelConfig",
        "settings are checked, and engines built from them",
        "serving/test_engine_settings.py",
        has=(
            "disable_sliding_window dtype enforce_eager hf_config is_moe logits_processors max_model_len model "
            "model_weights quantization served_model_name"
        ),
        mentions="MODEL_ARCH_CONFIG_CONVERTORS MODELS_CONFIG_MAP runner_type verify_and_update_model_config",
    ),
    Seam(
        "vllm.config:CacheConfig",
        "the caches are built in its dtype",
        "serving/test_engine_settings.py",
        has="cache_dtype kv_offloading_size kv_sharing_fast_prefill num_gpu_blocks",
    ),
    Seam(
        "vllm.config:KVTransferConfig",
        "KV connectors that cannot move caches which share blocks are refused",
        "serving/test_connectors.py",
        has="kv_buffer_device kv_connector kv_connector_extra_config kv_connector_module_path",
    ),
    Seam(
        "vllm.config:SchedulerConfig",
        "the default number of tokens in a step is lowered",
        "serving/test_engine_settings.py",
        has=(
            "DEFAULT_MAX_NUM_BATCHED_TOKENS disable_hybrid_kv_cache_manager enable_chunked_prefill "
            "max_num_batched_tokens max_num_seqs watermark"
        ),
    ),
    Seam(
        "vllm.config:ParallelConfig",
        "heads and experts have to divide by the ranks",
        "serving/test_tensor_parallel.py",
        has=(
            "data_parallel_index data_parallel_size data_parallel_size_local decode_context_parallel_size "
            "enable_expert_parallel pipeline_parallel_size prefill_context_parallel_size "
            "tensor_parallel_size use_ubatching worker_cls world_size"
        ),
    ),
    Seam(
        "vllm.config:CompilationConfig",
        "two units of the model are compiled, and the cached layers are looked up in its context",
        "serving/test_compilation.py",
        has=(
            "cudagraph_copy_inputs cudagraph_mode fast_moe_cold_start inductor_compile_config mode splitting_ops "
            "static_forward_context"
        ),
    ),
    Seam(
        "vllm.config:AttentionConfig",
        "a user's own backend is kept",
        "serving/test_backend.py",
        has="backend backend_per_kind",
    ),
    Seam(
        "vllm.config:KernelConfig",
        "experts that clamp take Triton",
        "serving/test_engine_settings.py",
        has="moe_backend",
    ),
    Seam("vllm.config:LoadConfig", "dummy weights need no files", "serving/test_engine_settings.py", has="load_format"),
    Seam("vllm.config:SpeculativeConfig", "draft models are refused", "serving/test_engine_settings.py", has="method"),
    Seam(
        "vllm.config:CompilationMode",
        "the loop must not be unrolled into one graph",
        "serving/test_engine_settings.py",
        has="NONE STOCK_TORCH_COMPILE",
    ),
    Seam(
        "vllm.config:CUDAGraphMode",
        "reduced steps run outside of piecewise graphs",
        "serving/test_compilation.py",
        has="FULL FULL_AND_PIECEWISE NONE PIECEWISE has_piecewise_cudagraphs",
    ),
    Seam(
        "vllm.config:get_current_vllm_config", "our kernels size their scratch by it", "serving/test_fused_attention.py"
    ),
    Seam(
        "vllm.config.utils:normalize_value",
        "code is compiled once for every T",
        "serving/test_compilation.py",
        behaves=behaviour.use_of_uuid,
    ),
    Seam(
        "vllm.engine.arg_utils:EngineArgs",
        "vLLM's default number of tokens in a step is told from a user's own",
        "serving/test_engine_settings.py",
        has="get_batch_defaults",
        behaves=behaviour.pair_of_defaults,
    ),
    Seam(
        "vllm.compilation.breakable_cudagraph:is_breakable_cudagraph_enabled",
        "where graphs break, the cross-decoder runs between two of them, on the rows of a step",
        "rows/test_breakable_graphs.py",
    ),
    Seam(
        "vllm:envs",
        "batch invariance is asked for by a variable, and on a CPU attention must not split contexts",
        "serving/test_batch_invariance.py",
        has="VLLM_BATCH_INVARIANT VLLM_CPU_ATTN_SPLIT_KV",
    ),
    Seam(
        "vllm.v1.worker.cpu_worker:CPUWorker",
        "an engine on a CPU that is batch invariant has a worker of its own",
        "serving/test_batch_invariance.py",
        has="init_device",
        only="cpu",
    ),
    Seam(
        "vllm.model_executor.determinism:batch_invariant",
        "on a CPU, vLLM must not put kernels for GPUs in place of torch's operators",
        "serving/test_batch_invariance.py",
        has="init_batch_invariance",
        only="cpu",
    ),
    Seam("vllm.triton_utils:HAS_TRITON", "our kernels need Triton", "serving/test_engine_settings.py"),
    Seam(
        "vllm.model_executor.layers.utils:check_cpu_sgl_kernel",
        "W8A8 in float32 is refused on processors with AMX",
        "serving/test_quantization.py",
        only="cpu",
    ),
    Seam(
        "vllm.utils.cpu_resource_utils:get_memory_affinity",
        "engines on a CPU need a memory node each",
        "test_workarounds.py",
        only="cpu",
    ),
    Seam(
        "vllm.utils.cpu_resource_utils:get_visible_memory_node",
        "engines on a CPU need a memory node each",
        "test_workarounds.py",
        only="cpu",
    ),
    Seam(
        "vllm.platforms:current_platform",
        "devices have rules of their own",
        "test_workarounds.py",
        has="device_type get_device_capability is_cpu is_cuda",
    ),
)

REQUESTS = (
    Seam(
        "vllm:SamplingParams",
        "requests that want prompt log probabilities run every row",
        "rows/test_skipping.py",
        has="prompt_logprob_token_ids prompt_logprobs sampling_type seed",
    ),
    Seam("vllm.sampling_params:SamplingType", "seeds are refused on CPUs", "test_workarounds.py", has="RANDOM_SEED"),
    Seam(
        "vllm.exceptions:VLLMValidationError",
        "a refused request is a client's error",
        "serving/test_server.py",
        takes="parameter value",
    ),
    Seam(
        "vllm.v1.sample.logits_processor:LogitsProcessor",
        "the V1 runner tells the row selection of its requests",
        "rows/test_skipping.py",
        has="apply is_argmax_invariant update_state validate_params",
        takes="vllm_config device is_pin_memory",
    ),
    Seam(
        "vllm.v1.sample.logits_processor:validate_logits_processors_parameters",
        "the V1 runner would end with a seeded request",
        "serving/test_server.py",
        mentions="validate_params",
    ),
    Seam(
        "vllm.v1.metrics.prometheus:get_prometheus_registry",
        "the row counters are shown in this registry",
        "rows/test_metrics.py",
        mentions="REGISTRY",
    ),
    Seam(
        "vllm.v1.sample.logits_processor:BatchUpdate",
        "the V1 runner tells the row selection of its requests",
        "rows/test_skipping.py",
        has="added moved",
    ),
    Seam(
        "vllm.v1.sample.logits_processor:MoveDirectionality",
        "the V1 runner tells the row selection of its requests",
        "rows/test_skipping.py",
        has="SWAP",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
        "the V2 runner asks the model for its hook",
        "rows/test_skipping.py",
        mentions="get_model_state_cls",
    ),
    Seam(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
        "the V2 runner tells the row selection of its requests",
        "rows/test_skipping.py",
        has="add_request",
        takes="vllm_config model encoder_cache device",
    ),
    Seam(
        "vllm.v1.core.sched.output:NewRequestData",
        "the V2 runner tells the row selection of its requests",
        "rows/test_skipping.py",
        has="prefill_token_ids req_id sampling_params",
    ),
)
