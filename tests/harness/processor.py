"""What vLLM's CPU kernels can do on one x86 processor and not on the next; each answer asks the processor."""

import torch


def reads_fp8_caches() -> bool:
    """Whether vLLM's attention takes a KV cache of eight bits: AVX-512, or AMX, Intel's tiles."""
    return torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
