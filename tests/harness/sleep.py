"""What sleep level 2 leaves of a model: buffers come back, parameters are loaded again, other tensors are lost."""

from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType

import torch
from torch import nn

# Not the model's own, though it knows them: settings, caches, and what the runner makes for each step. Their memory has
# other tags, under which vLLM keeps or drops them by themselves. Adapters are put in place again after every load, and
# their maps are made for each step.
ELSEWHERE = {"vllm_config", "compilation_config", "config", "quant_config", "_kv_cache", "_views", "_metadata"}
ADAPTERS = {"_lora_manager", "adapters", "map_adapters", "punica_wrapper", "lora_a_stacked", "lora_b_stacked"}
# In the host's memory, wherever the model is.
ON_THE_HOST = {"iterations", "_k_scale_cpu", "_v_scale_cpu"}
SIMPLE = (str, bytes, int, float, complex, type, torch.dtype, torch.device, ModuleType, FunctionType)


@torch.no_grad()
def drop_weights(model: nn.Module) -> None:
    """Overwrite all parameters, as another user of the memory would."""
    for parameter in model.parameters():
        for tensor in (parameter, parameter.data):  # a parameter of vLLM's may be a view of what its kernel reads
            tensor.fill_(float("nan") if tensor.is_floating_point() else 85)


def lost_tensors(model: nn.Module) -> list[str]:
    """The ways to all tensors on the device that the model reaches and that are no parameter and no buffer of it."""
    kept = {memory(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    return [path for path, tensor in reached(model, "model", set()) if memory(tensor) not in kept]


def memory(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def reached(it: object, path: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    if id(it) in seen or it is None or isinstance(it, SIMPLE):
        return
    seen.add(id(it))
    if isinstance(it, torch.Tensor):
        if it.numel():
            yield path, it
        return
    for name, part in parts_of(it):
        if name not in ELSEWHERE | ADAPTERS | ON_THE_HOST:
            yield from reached(part, f"{path}.{name}", seen)


def parts_of(it: object) -> Iterator[tuple[str, object]]:
    if isinstance(it, dict):
        yield from ((str(key), part) for key, part in it.items())
    elif isinstance(it, (list, tuple, set, frozenset)):
        yield from ((str(place), part) for place, part in enumerate(it))
    elif isinstance(it, MethodType):
        yield "self", it.__self__
    else:
        yield from getattr(it, "__dict__", {}).items()
        slots = (name for kind in type(it).__mro__ for name in getattr(kind, "__slots__", ()))
        yield from ((name, getattr(it, name)) for name in slots if isinstance(name, str) and hasattr(it, name))
