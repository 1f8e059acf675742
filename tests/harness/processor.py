"""What vLLM's CPU kernels can do on one x86 processor and not on the next; each answer asks the processor."""

import torch


def reads_fp8_caches() -> bool:
    """Whether vLLM's attention takes a KV cache of eight bits: AVX-512, or AMX, Intel's tiles."""
    return torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()


def has_bfloat16_units() -> bool:
    """Whether products of bfloat16 are an instruction, of AVX-512 BF16 or AMX; elsewhere they take several times."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
