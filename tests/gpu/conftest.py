"""These tests need a GPU, and say so elsewhere. Those of the tier itself are in tests/test_gpu_tier.py."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, on which `make gpu-all` runs it"))
