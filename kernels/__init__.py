"""Triton kernels for the window caches and the global cache. None yet: attention runs on vLLM's own kernels."""
