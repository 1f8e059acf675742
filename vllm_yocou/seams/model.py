"""Seams where vLLM builds the model, its layers, and its adapters."""

from vllm_yocou.seams.seam import Seam

LAYERS = (
    Seam(
        "vllm.model_executor.layers.linear:QKVParallelLinear",
        "its queries, keys and values are projected by this layer",
        "serving/test_tensor_parallel.py",
        takes="bias prefix quant_config total_num_heads total_num_kv_heads",
        mentions="num_heads num_kv_heads",
    ),
    Seam(
        "vllm.model_executor.layers.linear:ColumnParallelLinear",
        "its queries, keys and values are projected by this layer",
        "serving/test_tensor_parallel.py",
        takes="bias prefix quant_config",
    ),
    Seam(
        "vllm.model_executor.layers.linear:RowParallelLinear",
        "its queries, keys and values are projected by this layer",
        "serving/test_tensor_parallel.py",
        takes="bias prefix quant_config",
    ),
    Seam(
        "vllm.model_executor.layers.linear:ReplicatedLinear",
        "a shared expert's gate is this layer, and so are the projections of latent experts",
        "serving/test_feed_forward.py",
        takes="bias prefix quant_config",
    ),
    Seam(
        "vllm.model_executor.layers.linear:LinearBase",
        "with batch invariance on a CPU, every linear layer multiplies in tiles",
        "serving/test_fixed_tiles.py",
        mentions="quant_method",
    ),
    Seam(
        "vllm.model_executor.layers.linear:UnquantizedLinearMethod",
        "with batch invariance on a CPU, every linear layer multiplies in tiles",
        "serving/test_fixed_tiles.py",
        has="apply process_weights_after_loading",
    ),
    Seam(
        "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        "with batch invariance on a CPU, random weights are multiplied as a layer's are",
        "serving/test_fixed_tiles.py",
        takes="remove_weight",
        mentions="cpu_linear",
    ),
    Seam(
        "vllm.model_executor.layers.layernorm:RMSNorm",
        "rows and heads are normed by this layer",
        "serving/test_model.py",
        has="forward",
        takes="dtype eps",
        mentions="hidden_size variance_epsilon",
    ),
    Seam(
        "vllm.model_executor.models.llama:LlamaMLP",
        "its feed-forward is this layer",
        "serving/test_model.py",
        takes="prefix quant_config",
        mentions="act_fn",
    ),
    Seam(
        "vllm.model_executor.models.qwen2_moe:Qwen2MoeMLP",
        "its shared experts are this layer",
        "serving/test_feed_forward.py",
        takes="expert_gate prefix quant_config reduce_results",
        mentions="act_fn expert_gate",
    ),
    Seam(
        "vllm.model_executor.layers.activation:SiluAndMul",
        "this layer computes a SwiGLU that is not clamped",
        "serving/test_model.py",
    ),
    Seam(
        "vllm.model_executor.layers.activation:SiluAndMulWithClamp",
        "this layer computes a clamped SwiGLU",
        "serving/test_switches.py",
        takes="swiglu_limit",
        mentions="swiglu_limit",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe:FusedMoEFactory",
        "its routed experts are made by this",
        "serving/test_feed_forward.py",
        takes=(
            "hidden_size intermediate_size num_experts prefix quant_config renormalize "
            "routed_input_transform routed_output_transform router_logits_dtype shared_experts swiglu_limit top_k"
        ),
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe:MoERunner",
        "latent experts are summed over ranks before they are normed, and experts that do not clamp are replaced",
        "serving/test_switches.py",
        has="_replace_quant_method",
        mentions="moe_config reduce_commutative routed_experts",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe.modular_kernel:FusedMoEExperts",
        "most of the kernels that clamp what routed experts compute do it here",
        "serving/test_expert_kernels.py",
        mentions="activation_config",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe.experts.triton_moe:TritonExperts",
        "this kernel clamps what routed experts compute",
        "serving/test_expert_kernels.py",
        mentions="clamp_limit",
        only="cuda",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe:UnquantizedFusedMoEMethod",
        "on a CPU another loop takes the place of its experts",
        "serving/test_expert_kernels.py",
        mentions="experts_cls",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts",
        "on a CPU a loop of the plugin's own computes experts",
        "serving/test_looped_experts.py",
        has="_supports_batch_invariance output_alignment process_weights_after_loading",
        mentions="moe_config",
        only="cpu",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts.apply",
        "on a CPU a loop of the plugin's own computes experts",
        "serving/test_looped_experts.py",
        takes="output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts expert_map",
        only="cpu",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe:GateLinear",
        "rows are routed to experts by this layer",
        "serving/test_feed_forward.py",
        takes="out_dtype params_dtype prefix",
    ),
    Seam(
        "vllm.model_executor.layers.rotary_embedding:get_rope",
        "queries and keys are rotated by vLLM's layers",
        "serving/test_rope.py",
        takes="dtype is_neox_style rope_parameters",
    ),
    Seam(
        "vllm.model_executor.layers.rotary_embedding.base:RotaryEmbedding",
        "the RoPE of the 2024 YOCO code is made of this layer",
        "serving/test_rope.py",
        has="_compute_inv_freq",
        takes="head_size rotary_dim max_position_embeddings base is_neox_style dtype",
        mentions="cos_sin_cache is_neox_style rotary_dim",
    ),
    Seam(
        "vllm.model_executor.layers.logits_processor:LogitsProcessor",
        "logits are computed by this layer",
        "serving/test_model.py",
        takes="scale",
    ),
    Seam(
        "vllm.model_executor.layers.vocab_parallel_embedding:ParallelLMHead",
        "its head is this layer",
        "serving/test_model.py",
        has="tie_weights",
        takes="prefix quant_config",
    ),
    Seam(
        "vllm.model_executor.layers.vocab_parallel_embedding:UnquantizedEmbeddingMethod",
        "with batch invariance on a CPU, the head multiplies in tiles",
        "serving/test_fixed_tiles.py",
        has="apply process_weights_after_loading",
    ),
    Seam(
        "vllm.model_executor.layers.vocab_parallel_embedding:VocabParallelEmbedding",
        "its embedding is this layer",
        "serving/test_model.py",
        takes="prefix quant_config",
    ),
)

MODEL = (
    Seam(
        "vllm.model_executor.models.interfaces_base:VllmModel",
        "vLLM calls the model's methods by these names",
        "serving/test_model.py",
        has="embed_input_ids forward",
    ),
    Seam(
        "vllm.model_executor.models.interfaces_base:VllmModelForTextGeneration",
        "vLLM calls the model's methods by these names",
        "serving/test_model.py",
        has="compute_logits",
    ),
    Seam(
        "vllm.model_executor.model_loader.utils:initialize_model",
        "vLLM builds the model with these arguments",
        "serving/test_model.py",
        mentions="vllm_config prefix",
    ),
    Seam(
        "vllm.model_executor.models.interfaces:SupportsLoRA",
        "adapters are served",
        "serving/test_lora.py",
        has="packed_modules_mapping",
    ),
    Seam(
        "vllm.model_executor.models.utils:AutoWeightsLoader",
        "weights are loaded by vLLM's loader",
        "serving/test_bad_checkpoints.py",
        has="load_weights",
    ),
    Seam(
        "vllm.model_executor.models.utils:AutoWeightsLoader.load_weights",
        "weights are loaded by vLLM's loader",
        "serving/test_bad_checkpoints.py",
        takes="mapper",
    ),
    Seam(
        "vllm.model_executor.models.utils:WeightsMapper",
        "stored names become those of merged projections",
        "serving/test_bad_checkpoints.py",
        has="apply_list",
        takes="orig_to_new_stacked",
    ),
    Seam(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
        "a model is in evaluation mode once it has started",
        "serving/test_weight_update.py",
        mentions="eval load_weights",
    ),
    Seam(
        "vllm.model_executor.model_loader.reload:initialize_layerwise_reload",
        "new weights reach a running engine by vLLM's reload",
        "serving/test_weight_update.py",
    ),
    Seam(
        "vllm.model_executor.model_loader.reload:finalize_layerwise_reload",
        "new weights reach a running engine by vLLM's reload",
        "serving/test_weight_update.py",
    ),
    Seam(
        "vllm.model_executor.model_loader.reload.layerwise:get_layerwise_info",
        "a refused update gives layers back what they had",
        "serving/test_weight_update.py",
    ),
    Seam(
        "vllm.model_executor.model_loader.reload.types:LayerReloadingInfo",
        "a refused update gives layers back what they had",
        "serving/test_weight_update.py",
        has="can_load kernel_tensors reset restore_metadata",
    ),
    Seam(
        "vllm.model_executor.model_loader.reload.layerwise:_place_kernel_tensors",
        "a refused update gives layers back what they had",
        "serving/test_weight_update.py",
    ),
    Seam(
        "vllm.config:set_current_vllm_config",
        "weights are loaded as at a start",
        "serving/test_weight_update.py",
    ),
    Seam(
        "vllm.utils.torch_utils:set_default_torch_dtype",
        "weights are loaded as at a start",
        "serving/test_weight_update.py",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts",
        "experts are packed again on a CPU",
        "test_workarounds.py",
    ),
    Seam(
        "vllm:_custom_ops",
        "scales of int8 matrices stay in memory on a CPU",
        "test_workarounds.py",
        has="create_onednn_scaled_mm",
        only="cpu",
    ),
    Seam("vllm.model_executor.models.utils:maybe_prefix", "layers are named", "serving/test_model.py"),
    Seam("vllm.sequence:IntermediateTensors", "a model's forward takes these", "serving/test_model.py"),
    Seam(
        "vllm.distributed:get_tensor_model_parallel_rank", "one rank logs and counts", "serving/test_tensor_parallel.py"
    ),
    Seam(
        "vllm.distributed:get_tensor_model_parallel_world_size", "ranks share heads", "serving/test_tensor_parallel.py"
    ),
    Seam(
        "vllm.compilation.cuda_graph:CUDAGraphWrapper",
        "the step that captures the pieces of a model runs the self-decoder once",
        "serving/test_compilation.py",
        has="_all_instances",
        mentions="compilation_config concrete_cudagraph_entries runtime_mode",
    ),
    Seam(
        "vllm.compilation.decorators:support_torch_compile",
        "two units of the model are compiled",
        "serving/test_compilation.py",
        takes="dynamic_arg_dims",
    ),
    Seam(
        "vllm.compilation.decorators:_try_load_aot_compiled_fn",
        "saved code is loaded again on a CPU",
        "test_workarounds.py",
        mentions="finalize_loading load_compiled_function",
        only="cpu",
    ),
    Seam(
        "vllm.compilation.decorators:_support_torch_compile",
        "only the first call of a unit needs a workaround",
        "serving/test_compilation.py",
        mentions="aot_compiled_fn compiled do_not_compile",
    ),
    Seam(
        "vllm.compilation.backends:set_model_tag",
        "each unit has compiled code of its own",
        "serving/test_compilation.py",
    ),
    Seam(
        "vllm.utils.torch_utils:direct_register_custom_op",
        "the iteration is read outside of compiled code",
        "serving/test_compilation.py",
        takes="fake_impl mutates_args op_func op_name",
    ),
    Seam("vllm.utils.torch_utils:LayerNameType", "layers are named in compiled code", "serving/test_compilation.py"),
    Seam(
        "vllm.utils.torch_utils:_encode_layer_name", "layers are named in compiled code", "serving/test_compilation.py"
    ),
    Seam(
        "vllm.utils.torch_utils:_resolve_layer_name", "layers are named in compiled code", "serving/test_compilation.py"
    ),
    Seam(
        "vllm.utils.torch_utils:async_tensor_h2d",
        "selected rows go to the device",
        "rows/test_skipping.py",
        takes="device",
    ),
    Seam("vllm.utils.math_utils:next_power_of_2", "Triton pads heads", "test_workarounds.py"),
    Seam(
        "vllm.lora.model_manager:LoRAModelManager",
        "reduced steps need the adapters of their own rows",
        "serving/test_lora.py",
        has="lora_slots",
        mentions="_last_mapping lora_manager punica_wrapper_mapping max_num_batched_tokens max_num_seqs device "
        "lora_config lora_index_to_id vocab_size",
    ),
    Seam(
        "vllm.lora.layers.utils:LoRAMapping",
        "reduced steps need the adapters of their own rows",
        "serving/test_lora.py",
        has="index_mapping",
    ),
    Seam(
        "vllm.lora.layers:BaseLayerWithLoRA",
        "the cross-decoder's layers have a map of their own in reduced steps",
        "serving/test_lora.py",
        has="set_mapping",
    ),
    Seam(
        "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase",
        "it maps rows to adapters",
        "serving/test_lora.py",
        has="update_metadata",
        takes="max_num_batched_tokens max_batches device",
    ),
    Seam(
        "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU",
        "vLLM's CPU operators would move rows without an adapter",
        "test_workarounds.py",
        has="add_lora_linear token_lora_indices",
        only="cpu",
    ),
)
