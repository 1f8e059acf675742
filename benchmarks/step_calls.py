"""What a decode step's calls cost in Python and in dispatch, each timed by itself inside a step, and how often it is.

The model is as deep as the 57M shape and so narrow that products take no time. Everything stays in the caches of one
core, so a call is cheaper than in a real step, where weights push it out.
"""

from benchmarks.engine import config, decoding, runner, start

import timeit
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.output_code import CompiledFxGraph
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.utils.torch_utils import _resolve_layer_name
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from benchmarks.console import publish
from benchmarks.results import Result
from benchmarks.tables.step_calls import ATTEND, NARROW, OPERATION, UNIT, WRITE
from vllm_yocou.serving import caches

SHAPE = "57M"
CONTEXT = 600
CALLS, REPEATS = 300, 15


def cost_us(call: Callable[[], Any]) -> list[float]:
    """Microseconds of a call, by repeat."""
    return [seconds / CALLS * 1e6 for seconds in timeit.repeat(call, number=CALLS, repeat=REPEATS)]


def of_window(found: dict[str, list[float]], *args: Any) -> None:
    """Times the parts of one call that writes a window and attends over it; `args` are that call's."""
    q_NHd, k_NKd, v_NKd, out_NHd, name = args
    metadata, layer, kv_cache, slots = get_attention_context(name)
    ours: Any = layer.impl
    vllms: Any = CPUAttentionBackendImpl
    writing, reading = (layer, k_NKd, v_NKd, kv_cache, slots), (layer, q_NHd, k_NKd, v_NKd, kv_cache, metadata)
    encoded, iteration = caches._encode_layer_name(name), torch.tensor(1)
    found |= {
        "forward context": cost_us(get_forward_context),
        "metadata, cache and slots of a layer": cost_us(lambda: get_attention_context(name)),
        "name of a layer": cost_us(lambda: _resolve_layer_name(encoded)),
        "number of the iteration": cost_us(lambda: int(iteration)),
        f"{WRITE}, vLLM's": cost_us(lambda: vllms.do_kv_cache_update(ours, *writing)),
        WRITE: cost_us(lambda: ours.do_kv_cache_update(*writing)),
        f"{ATTEND}, vLLM's": cost_us(lambda: vllms.forward(ours, *reading, output=out_NHd)),
        ATTEND: cost_us(lambda: ours.forward(*reading, output=out_NHd)),
    }
    with patch.object(caches, "write_and_attend_window", lambda *_: None):
        window = (q_NHd, k_NKd, v_NKd, out_NHd, iteration, encoded)
        found[OPERATION] = cost_us(lambda: torch.ops.vllm.yocou_attend_windows(*window))


def of_unit(found: dict[str, list[float]], unit: Callable[..., torch.Tensor], *args: torch.Tensor) -> None:
    """Times a call of compiled code without what the code computes."""
    run, inside = CompiledFxGraph.__call__, {}

    def once(graph: CompiledFxGraph, inputs: Any) -> Any:
        inside["outputs"] = run(graph, inputs)
        return inside["outputs"]

    with patch.object(CompiledFxGraph, "__call__", once):
        unit(*args)
    assert "outputs" in inside, "compiled code does not run as a CompiledFxGraph"
    with patch.object(CompiledFxGraph, "__call__", lambda graph, inputs: inside["outputs"]):
        found[UNIT] = cost_us(lambda: unit(*args))


def measure() -> Result:
    cfg = config(SHAPE, **NARROW)
    settings: dict[str, Any] = dict(max_model_len=4096, max_num_seqs=1, kv_cache_memory_bytes=128 << 20)
    llm = start(cfg, **settings)
    model = runner(llm).model.model
    windows, reads = cfg.num_iterations * cfg.num_self_decoder_layers, cfg.num_cross_decoder_layers
    times = {
        "forward context": 2 * windows + reads + 1,
        "metadata, cache and slots of a layer": windows + reads + 1,
        "name of a layer": windows + reads,
        WRITE: windows + 1,
        OPERATION: windows + reads,
        UNIT: cfg.num_iterations + 1,
    }
    found: dict[str, list[float]] = {}
    write, unit = caches.write_and_attend_window, type(model.self_decoder).__call__

    def first_window(*args: Any) -> None:
        if ATTEND not in found:
            of_window(found, *args)
        write(*args)

    def first_unit(self: Any, *args: torch.Tensor) -> torch.Tensor:
        if UNIT not in found:
            of_unit(found, lambda *inputs: unit(self, *inputs), *args)
        return unit(self, *args)

    with decoding(llm, 1, CONTEXT):
        with patch.object(caches, "write_and_attend_window", first_window):
            llm.llm_engine.step()
        with patch.object(type(model.self_decoder), "__call__", first_unit):
            llm.llm_engine.step()
    result = Result.here("step_calls", shape=SHAPE, context=CONTEXT, repeats=REPEATS, calls=CALLS)
    result.settings["threads"] = torch.get_num_threads()
    for call, costs in found.items():
        result.add("call", "us", costs, call=call)
        result.add("calls", "calls", times.get(call.removesuffix(", vLLM's"), windows), call=call)
    return result


if __name__ == "__main__":
    publish(measure())
