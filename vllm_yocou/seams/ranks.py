"""Seams where data-parallel ranks share experts, and exchange the rows of a step."""

from vllm_yocou.seams.seam import Seam

RANKS = (
    Seam(
        "vllm.distributed:get_dp_group",
        "ranks that share experts agree on their rows",
        "serving/test_expert_parallel.py",
    ),
    Seam(
        "vllm.distributed.parallel_state:GroupCoordinator",
        "ranks that share experts agree on their rows",
        "serving/test_expert_parallel.py",
        mentions="all_gatherv cpu_group device_communicator rank_in_group reduce_scatterv",
    ),
    Seam(
        "vllm.forward_context:DPMetadata",
        "ranks that share experts are told of each other's rows",
        "serving/test_expert_parallel.py",
        takes="num_tokens_across_dp_cpu",
    ),
    Seam(
        "vllm.v1.worker.dp_utils:should_skip_dp_coordination",
        "ranks that run on their own agree on nothing",
        "rows/test_ranks.py",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig",
        "ranks share experts",
        "serving/test_expert_parallel.py",
        has="dp_size use_ep",
    ),
    Seam(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner",
        "compiled code on a CPU would keep the rows of the first step",
        "serving/test_expert_parallel.py",
        has="shared_experts",
        mentions="_forward_entry moe_forward moe_forward_shared",
        only="cpu",
    ),
    Seam(
        "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator",
        "ranks on a CPU exchange rows by it",
        "test_workarounds.py",
        has="all_gatherv all_reduce reduce_scatterv",
        only="cpu",
    ),
    Seam(
        "vllm.distributed.device_communicators.all2all:AgRsAll2AllManager",
        "ranks on a CPU exchange rows by it",
        "serving/test_expert_parallel.py",
        mentions="all_gatherv get_chunk_sizes_across_dp_rank reduce_scatterv_into_output",
        only="cpu",
    ),
)
