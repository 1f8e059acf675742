"""Seams where vLLM builds the caches, and the metadata of the attention over them."""

from vllm_yocou.seams import behaviour
from vllm_yocou.seams.seam import Seam

ATTENTION = (
    Seam(
        "vllm.v1.attention.backend:AttentionBackend",
        "vLLM's backends run over packed memory under names of ours",
        "serving/test_backend.py",
        has=(
            "customize_spec get_builder_cls get_impl_cls get_name get_supported_kernel_block_sizes "
            "supported_kv_cache_dtypes supported_kv_cache_layouts supports_device_cpu_query_lens_mismatch "
            "supports_kv_cache_dtype"
        ),
    ),
    Seam(
        "vllm.v1.attention.backend:AttentionMetadataBuilder",
        "the rows of a step are selected where its metadata are built",
        "rows/test_skipping.py",
        has="build build_for_cudagraph_capture get_cudagraph_support",
        takes="kv_cache_spec layer_names vllm_config device",
    ),
    Seam(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        "the rows of a step are selected where its metadata are built",
        "rows/test_skipping.py",
        takes="common_prefix_len common_attn_metadata fast_build",
    ),
    Seam(
        "vllm.v1.attention.backend:AttentionMetadataBuilder.get_cudagraph_support",
        "graphs of mixed batches would be captured with all rows",
        "serving/test_compilation.py",
        takes="vllm_config kv_cache_spec",
    ),
    Seam(
        "vllm.v1.attention.backend:AttentionImpl.forward",
        "attention and our kernels call an implementation as vLLM does",
        "serving/test_model.py",
        takes="layer query key value kv_cache attn_metadata output",
    ),
    Seam(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadata",
        "our kernels read a step's metadata",
        "serving/test_fused_attention.py",
        has="block_table max_query_len num_actual_tokens query_start_loc seq_lens",
    ),
    Seam(
        "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder",
        "its scratch memory has to be as wide as the global cache's heads",
        "test_workarounds.py",
        mentions="softmax_segm_output",
    ),
    Seam(
        "vllm.v1.attention.backend:AttentionCGSupport",
        "graphs of mixed batches would be captured with all rows",
        "serving/test_compilation.py",
        has="UNIFORM_BATCH",
        behaves=behaviour.order_of_levels,
    ),
    Seam(
        "vllm.v1.attention.backend:AttentionBackend.get_supported_kernel_block_sizes",
        "a page is some multiple of what a layer's kernels take",
        "serving/test_backend.py",
        takes="kv_cache_spec",
    ),
    Seam("vllm.v1.attention.backend:AttentionMetadata", "rows belong to the step's metadata", "rows/test_hand_over.py"),
    Seam("vllm.v1.attention.backend:MultipleOf", "a page is the smallest block", "serving/test_backend.py", has="base"),
    Seam(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        "the selection reads a step's batch, and attention gets a smaller one",
        "rows/test_skipping.py",
        has=(
            "_num_computed_tokens_cache _token_to_req_indices_cache is_prefilling max_query_len num_actual_tokens "
            "block_table_tensor num_reqs positions query_start_loc query_start_loc_cpu replace req_idx seq_lens "
            "seq_lens_cpu_upper_bound"
        ),
    ),
    Seam(
        "vllm.v1.attention.backend:max_decode_query_len",
        "steps of decodes alone are never reduced",
        "rows/test_selection.py",
        takes="vllm_config",
    ),
    Seam(
        "vllm.v1.attention.backends.registry:AttentionBackendEnum",
        "vLLM's backends run over packed memory under names of ours",
        "serving/test_backend.py",
        has="CPU_ATTN FLASH_ATTN TRITON_ATTN get_class register",
    ),
    Seam(
        "vllm.v1.attention.selector:get_attn_backend",
        "vLLM selects the backend that we build on",
        "serving/test_backend.py",
        takes="has_sliding_window",
    ),
    Seam(
        "vllm.platforms.cuda:_get_backend_priorities",
        "where vLLM would select another backend, its next one is taken",
        "serving/test_backend.py",
        takes="use_mla device_capability",
        only="cuda",
    ),
    Seam(
        "vllm.model_executor.layers.attention:Attention",
        "each cache is one of vLLM's attention layers",
        "serving/test_model.py",
        has="bind_kv_cache get_kv_cache_spec",
        takes="attn_backend cache_config num_kv_heads per_layer_sliding_window prefix quant_config",
        mentions=(
            "_q_scale attn_backend head_size head_size_v impl kv_cache_dtype kv_cache_torch_dtype layer_name num_heads "
            "query_quant sliding_window"
        ),
    ),
    Seam(
        "vllm.model_executor.layers.attention.attention:unified_kv_cache_update",
        "the global cache is written by it",
        "serving/test_model.py",
    ),
    Seam(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
        "on a CPU, caches are written and read over views that are made once",
        "serving/test_kept_views.py",
        has="do_kv_cache_update forward",
        mentions="_k_scale_float _v_scale_float isa kv_cache_dtype scale sliding_window",
    ),
    Seam(
        "vllm._custom_ops:cpu_attn_reshape_and_cache",
        "on a CPU, caches are written over views that are made once",
        "serving/test_kept_views.py",
        takes="key value key_cache value_cache slot_mapping isa k_scale v_scale kv_cache_dtype",
    ),
    Seam(
        "vllm._custom_ops:cpu_attention_with_kv_cache",
        "on a CPU, caches are read over views that are made once",
        "serving/test_kept_views.py",
        takes=(
            "query key_cache value_cache output query_start_loc seq_lens scale causal alibi_slopes sliding_window "
            "block_table softcap scheduler_metadata s_aux dynamic_causal k_scale v_scale kv_cache_dtype"
        ),
    ),
    Seam(
        "vllm.model_executor.layers.attention.attention:get_attention_context",
        "attention and our kernels find a layer's metadata and memory by it",
        "serving/test_model.py",
    ),
    Seam(
        "vllm.model_executor.layers.attention.kv_transfer_utils:maybe_transfer_kv_layer",
        "a KV connector loads a cache before it is written, and saves it after",
        "serving/test_kv_connectors.py",
    ),
    Seam(
        "vllm.compilation.breakable_cudagraph:eager_break_during_capture",
        "what a KV connector does is not captured, and neither is the cross-decoder of a step that skips rows",
        "serving/test_kv_connectors.py",
    ),
    Seam(
        "vllm.forward_context:ForwardContext",
        "a step's metadata and layers are in it",
        "serving/test_model.py",
        has="attn_metadata batch_descriptor cudagraph_runtime_mode dp_metadata no_compile_layers slot_mapping",
    ),
    Seam(
        "vllm.forward_context:in_piecewise_cudagraph",
        "breakable graphs break before the cross-decoder while they are captured",
        "rows/test_breakable_graphs.py",
    ),
    Seam("vllm.forward_context:get_forward_context", "a step's metadata and layers are in it", "serving/test_model.py"),
)

# check.py also looks at what it does, with the configuration of an engine.
GROUPING = Seam(
    ("vllm.v1.core.kv_cache_planning:get_kv_cache_groups", "vllm.v1.core.kv_cache_utils:get_kv_cache_groups"),
    "window caches are packed into few groups",
    "serving/test_packing.py",
    moved="0.32",
)

CACHES = (
    GROUPING,
    Seam(
        "vllm.model_executor.models.utils:extract_layer_index",
        "caches are named so that vLLM finds one number in each name",
        "serving/test_model.py",
        behaves=behaviour.number_in_a_name,
    ),
    Seam(
        "vllm.v1.kv_cache_interface:AttentionSpec",
        "the caches' specs extend vLLM's",
        "serving/test_packing.py",
        has="head_size page_size_bytes",
    ),
    Seam(
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "the caches' specs extend vLLM's",
        "serving/test_packing.py",
        takes="block_size dtype head_size head_size_v kv_quant_mode num_kv_heads",
    ),
    Seam(
        "vllm.v1.kv_cache_interface:SlidingWindowSpec",
        "the caches' specs extend vLLM's",
        "serving/test_packing.py",
        takes="block_size dtype head_size head_size_v kv_quant_mode num_kv_heads sliding_window",
    ),
    Seam(
        "vllm.v1.kv_cache_interface:KVCacheLayout",
        "packed caches need the block outermost",
        "serving/test_backend.py",
        has="BLHNC BLNHC",
    ),
    Seam("vllm.v1.kv_cache_interface:get_kv_quant_mode", "FP8 caches have specs of their own", "serving/test_model.py"),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
        "vLLM's manager of this kind manages the global cache",
        "serving/test_packing.py",
    ),
    Seam(
        "vllm.v1.core.single_type_kv_cache_manager:SlidingWindowManager",
        "vLLM's manager of this kind manages the window caches",
        "serving/test_packing.py",
    ),
    Seam(
        "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry",
        "the caches' specs are registered with vLLM",
        "test_workarounds.py",
        has="_ensure_registered register",
    ),
)
