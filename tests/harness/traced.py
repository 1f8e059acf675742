"""Compiled units without a compiler: torch.compile traces them as ever, and the graphs then run as they are."""

from collections.abc import Callable

import torch
from torch._dynamo.backends.debugging import eager
from vllm.platforms.cpu import CpuPlatform

graphs: list[torch.fx.GraphModule] = []


def keep(graph: torch.fx.GraphModule, inputs: list, **settings) -> Callable:
    """A backend of torch.compile's: notes the graph and compiles nothing."""
    graphs.append(graph)
    return eager(graph, inputs, **settings)


def install(monkeypatch) -> list[torch.fx.GraphModule]:
    """For one test: engines that would be compiled by Inductor have their units traced alone; the graphs, in order."""
    check = CpuPlatform.check_and_update_config

    def without_inductor(vllm_config) -> None:
        check(vllm_config)
        if vllm_config.compilation_config.backend == "inductor":
            vllm_config.compilation_config.backend = f"{__name__}.{keep.__name__}"

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(without_inductor))
    graphs.clear()
    return graphs
