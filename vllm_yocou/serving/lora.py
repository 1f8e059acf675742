"""A LoRA adapter moves the rows of its own requests and no others, also in layers that run on fewer than all rows.

vLLM keeps one map from rows to adapters for all layers, made before the step for all of its rows. The cross-decoder has
a second one for the rows that are selected. It is made where the rows are selected, before the forward pass, because
making a map waits for the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.model_manager import LoRAModelManager

from vllm_yocou.workarounds import spare_rows_without_adapter


class SelectedRowsAdapters:
    """vLLM's adapters in the cross-decoder's layers, for steps in which these run on the selected rows alone."""

    def __init__(self, manager: LoRAModelManager, cross_decoder: nn.Module):
        self.manager = manager
        self.layers = [layer for layer in cross_decoder.modules() if isinstance(layer, BaseLayerWithLoRA)]
        (self.of_all_rows,) = manager.punica_wrapper_mapping.values()
        self.of_selected_rows = type(self.of_all_rows)(
            manager.max_num_batched_tokens,
            max_batches=manager.max_num_seqs,
            device=manager.device,
            lora_config=manager.lora_config,
        )
        for wrapper in (self.of_all_rows, self.of_selected_rows):
            spare_rows_without_adapter(wrapper)

    def select(self, rows_M: np.ndarray) -> None:
        """Map the rows `rows_M` (M,) of the step, whose map of all rows vLLM has made, to their adapters."""
        step = self.manager._last_mapping
        assert step is not None  # vLLM maps the rows of a step before it builds attention metadata
        adapters = tuple(step.index_mapping[row] for row in rows_M.tolist())
        self.of_selected_rows.update_metadata(
            replace(step, index_mapping=adapters),
            self.manager.lora_index_to_id,
            self.manager.lora_slots + 1,
            self.manager.vocab_size,
        )

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """While the cross-decoder is called with the selected rows."""
        for layer in self.layers:
            layer.set_mapping(self.of_selected_rows)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.set_mapping(self.of_all_rows)
