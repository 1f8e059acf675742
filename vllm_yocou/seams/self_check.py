"""Seams of `vllm-yocou check` alone: serving does without them."""

from vllm_yocou.seams.seam import Seam

SELF_CHECK = (
    Seam(
        "vllm.entrypoints.llm:LLM",
        "the check starts an engine and asks its workers what is in force",
        "self_check/test_check.py",
        has="collective_rpc generate get_metrics",
    ),
    Seam(
        "vllm.distributed:cleanup_dist_env_and_memory",
        "the check starts one engine after the other in a process",
        "self_check/test_check.py",
    ),
    Seam(
        "vllm.sampling_params:SamplingParams",
        "the check asks for log probabilities",
        "self_check/test_check.py",
        has="detokenize ignore_eos logprobs max_tokens prompt_logprobs temperature",
    ),
)
