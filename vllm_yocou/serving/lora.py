"""A LoRA adapter moves the rows of its own requests and no others, also in layers that run on fewer than all rows.

vLLM keeps one map from rows to adapters for all layers, made before the step for all of its rows. What is here keeps
that map right for the cross-decoder's rows, and rows without an adapter unmoved on a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


@contextmanager
def adapters_of(rows_M: torch.Tensor, manager: LoRAModelManager | None) -> Iterator[None]:
    """While layers are called with the rows `rows_M` (M,) of the step alone, let vLLM find their adapters.

    `manager` is None where LoRA is off.
    """
    if manager is None:
        yield
        return
    whole = manager._last_mapping
    adapters = tuple(whole.index_mapping[row] for row in rows_M.tolist())
    manager.set_adapter_mapping(replace(whole, index_mapping=adapters))
    try:
        yield
    finally:
        manager.set_adapter_mapping(whole)


def spare_rows_without_adapter(manager: LoRAModelManager) -> None:
    """On a CPU, vLLM 0.32 takes the index of such rows, -1, for the last adapter slot (vllm-project/vllm#48421)."""
    for wrapper in manager.punica_wrapper_mapping.values():
        if isinstance(wrapper, PunicaWrapperCPU):
            _spare_rows_without_adapter(wrapper)


def _spare_rows_without_adapter(wrapper: PunicaWrapperCPU) -> None:
    add_to_all_rows = wrapper.add_lora_linear

    def add_lora_linear(y_NX: torch.Tensor, x_NX: torch.Tensor, *args, **kwargs) -> None:
        without_N = wrapper.token_lora_indices < 0
        base_LX = y_NX[without_N]
        add_to_all_rows(y_NX, x_NX, *args, **kwargs)
        y_NX[without_N] = base_LX

    wrapper.add_lora_linear = add_lora_linear
