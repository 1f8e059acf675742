"""vLLM's offloading connectors copy blocks that caches share from a GPU to the host and back.

A second engine with the simple connector cannot pin its memory in the same process, so `make gpu-all` starts others.
"""

import pytest
import torch
from harness import offloading, tiny
from harness.half_precision import HalfPrecision
from harness.offloading import NATIVE, SIMPLE

LEFT_OUT = ("spec_name", "spec_module_path")  # with them, the tests' copies take the place of vLLM's


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "TRITON_ATTN"])
@pytest.mark.parametrize("connector", [NATIVE, SIMPLE], ids=["native", "simple"])
def test_evicted_blocks_come_back(connector, backend, engine, tmp_path):
    model = tiny.model(tiny.config(**offloading.SHAPE))
    model.save_pretrained(tmp_path)
    extra = {key: value for key, value in connector["kv_connector_extra_config"].items() if key not in LEFT_OUT}
    llm = engine(
        tmp_path,
        dtype="bfloat16",
        attention_backend=backend,
        kv_transfer_config=connector | {"kv_connector_extra_config": extra},
        **offloading.SETTINGS,
    )
    deviation = HalfPrecision(model, torch.bfloat16)
    for prompt, output in offloading.ask_again(llm):
        deviation.compare(prompt, output)
    deviation.check()
