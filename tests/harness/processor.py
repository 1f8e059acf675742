"""What vLLM's CPU kernels do differently from one x86 processor to the next; each answer asks the processor."""

import torch


def has_amx() -> bool:
    """Intel's tile instructions, from Sapphire Rapids on."""
    return torch.cpu._is_amx_tile_supported()


def has_avx512() -> bool:
    return torch.cpu._is_avx512_supported()


def reads_fp8_caches() -> bool:
    """Elsewhere vLLM's attention refuses a KV cache of eight bits."""
    return has_avx512() or has_amx()


def w8a8_dtype() -> str:
    """Of activations beside a matrix of int8: with AMX vLLM's kernel takes half precision alone, elsewhere float32."""
    return "float16" if has_amx() else "float32"
