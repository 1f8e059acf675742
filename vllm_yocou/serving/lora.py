"""A LoRA adapter moves the rows of its own requests and no others, also in layers that run on fewer than all rows.

vLLM keeps one map from rows to adapters for all layers, made before the step for all of its rows. What is here keeps
that map right for the cross-decoder's rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from vllm.lora.model_manager import LoRAModelManager


@contextmanager
def adapters_of(rows_M: torch.Tensor, manager: LoRAModelManager | None) -> Iterator[None]:
    """While layers are called with the rows `rows_M` (M,) of the step alone, let vLLM find their adapters.

    `manager` is None where LoRA is off.
    """
    if manager is None:
        yield
        return
    whole = manager._last_mapping
    assert whole is not None  # vLLM maps the rows of a step before it
    adapters = tuple(whole.index_mapping[row] for row in rows_M.tolist())
    manager.set_adapter_mapping(replace(whole, index_mapping=adapters))
    try:
        yield
    finally:
        manager.set_adapter_mapping(whole)
