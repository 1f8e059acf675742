"""Triton kernels for the window caches and the global cache, each with an oracle in torch."""
