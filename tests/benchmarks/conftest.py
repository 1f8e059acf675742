"""What tests of tables share: engines of a table are gone when its test ends."""

import gc

import pytest


@pytest.fixture
def starts_vllm(starts_vllm):
    """One that is collected later takes the groups of the next one with it."""
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()
