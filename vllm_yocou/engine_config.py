"""Every engine setting under which YOCO-U would compute something wrong ends here, in one sentence, before a start.

vLLM runs this hook for YOCO-U models only, in the process that parses the command line.
"""

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_yocou.config import YocoUConfig

SPECULATIVE_METHODS = ("ngram",)


class YocoUEngineConfig(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        config = model_config.hf_config
        if model_config.disable_sliding_window:
            raise ValueError(
                "--disable-sliding-window cannot be used with YOCO-U: its self-decoder was trained with a window of a "
                "fixed size, leave the flag out."
            )
        config.check()  # once more: overrides given as a function bypass YocoUConfig.update
        if config.is_moe:
            raise ValueError(
                f"num_experts is {config.num_experts}: mixtures of experts are not served yet, "
                "run this checkpoint with transformers (import vllm_yocou.reference)."
            )

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        from vllm.config import CompilationMode

        parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
        _check_shards(vllm_config.model_config.hf_config, parallel.tensor_parallel_size)
        if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
            raise ValueError(
                "context parallelism cannot be used with YOCO-U: its window caches are not sharded over positions, "
                "use --tensor-parallel-size."
            )
        if speculative is not None and speculative.method not in SPECULATIVE_METHODS:
            raise ValueError(
                f"speculative decoding by '{speculative.method}' cannot be used with YOCO-U: no draft model shares its "
                "packed KV cache, use 'ngram' or leave it out."
            )
        if vllm_config.cache_config.kv_sharing_fast_prefill:
            raise ValueError(
                "--kv-sharing-fast-prefill cannot be used with YOCO-U: its cross-decoder has no KV-sharing layers in "
                "vLLM's sense, leave the flag out."
            )
        if vllm_config.compilation_config.mode is None:
            # The model is not compiled as a whole; compiling single operations costs start-up and a C++ compiler.
            vllm_config.compilation_config.mode = CompilationMode.NONE


def _check_shards(config: "YocoUConfig", ranks: int) -> None:
    """Ranks split query heads and feed-forward; they split KV heads too, or replicate them where ranks are more."""
    for key in ("num_attention_heads", "cross_num_attention_heads", "intermediate_size"):
        if getattr(config, key) % ranks:
            raise ValueError(
                f"{key} {getattr(config, key)} is not divisible by the tensor parallel size {ranks}: "
                "choose a size that divides it."
            )
    for key in ("num_key_value_heads", "cross_num_key_value_heads"):
        heads = getattr(config, key)
        if heads % ranks and ranks % heads:
            raise ValueError(
                f"{key} {heads} can be neither split over nor replicated on {ranks} tensor parallel ranks: "
                "choose a size that divides it or is a multiple of it."
            )
