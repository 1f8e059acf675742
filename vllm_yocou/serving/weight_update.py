"""Weights reach a running engine in parts, and every layer always serves one whole set of its tensors.

A trainer sends a checkpoint tensor by tensor, or in buckets. Where only some tensors of a fused matrix have come, vLLM
fills the rest of it with what the memory happens to hold. Here they wait for the others, and the layer serves what it
had until then. A part that does not fit is refused before any of it is loaded.

Each layer goes through vLLM's own layerwise reload, within an update that vLLM has begun or without one: it computes
what kernels want of the tensors, also where kernels have packed the old ones away, and copies it to the same addresses.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_yocou.checkpoints.format import expected_shapes, listed
from vllm_yocou.checkpoints.verify import Stored, check_part
from vllm_yocou.config import YocoUConfig
from vllm_yocou.workarounds import pack_experts_again, scales_kept

logger = logging.getLogger("vllm.plugins.yocou")

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Weights = Iterable[tuple[str, torch.Tensor]]


class WeightUpdate:
    """What a running model knows of its checkpoint's tensors, and those that wait for others of their layer."""

    def __init__(self, vllm_config: VllmConfig, mapper: WeightsMapper, quantized: bool):
        """
        Args:
            mapper: from the checkpoint's names to the model's.
            quantized: whether the checkpoint is quantized on disk, so that only a load can tell its tensors.
        """
        self.vllm_config, self.mapper, self.quantized = vllm_config, mapper, quantized
        self.stored: dict[str, Stored] = {}
        # Names of tensors by the layer that they belong to; and the tensors that have come for it.
        self.names: dict[str, set[str]] = {}
        self.waiting: dict[str, dict[str, torch.Tensor]] = {}

    def recorded(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass on the tensors of the load of a start, and remember those of a quantized checkpoint."""
        for name, tensor in weights:
            if self.quantized:
                self._remember(name, Stored(tuple(tensor.shape), tensor.dtype))
            yield name, tensor

    def _remember(self, name: str, stored: Stored) -> None:
        self.stored[name] = stored
        self.names.setdefault(self._layer(name), set()).add(name)

    def load(self, model: nn.Module, weights: Weights) -> set[str]:
        """Load what is whole with `weights`, and keep the rest until it is.

        Args:
            weights: (name, tensor) in the checkpoint's spelling. A list is one part, and so is what comes from host
                memory, where files are mapped. Of a stream in a device's memory, each tensor is a part.

        Returns:
            The model's names of the tensors that were taken; those of experts once their layer is whole.

        Raises:
            ValueError: a part does not fit. The parts before it stay, and all layers can be served again.
        """
        if not self.stored:
            self._expect()
        taken: set[str] = set()
        try:
            for part in parts(weights):
                if any(name in waiting for name, _ in part for waiting in self.waiting.values()):
                    self._warn_of_missing()
                taken |= self._take(model, part)
        except BaseException:
            give_back(model)
            raise
        if self.waiting and not isinstance(weights, Sequence):
            self._warn_of_missing()
        return taken

    def _expect(self) -> None:
        """Know the tensors of a plain checkpoint by the config, which the weights of the start have completed."""
        if self.quantized:
            load_format = self.vllm_config.load_config.load_format
            raise ValueError(
                f"new weights cannot be sent to a model that was started with --load-format {load_format} over a "
                "quantized checkpoint: only a load by names tells its tensors, start it without the flag."
            )
        config = cast(YocoUConfig, self.vllm_config.model_config.hf_config)
        for name, shape in expected_shapes(config).items():
            self._remember(name, Stored(shape))

    def _warn_of_missing(self) -> None:
        """Where a whole stream has not brought them, or a sender begins anew without them."""
        missing = {name for layer, came in self.waiting.items() for name in self.names.get(layer, {HEAD}) - came.keys()}
        logger.warning(
            "New weights wait for %s: a fused matrix and experts are served anew once all their tensors have come, "
            "send these too.",
            listed(sorted(missing)),
        )

    def _take(self, model: nn.Module, part: Sequence[tuple[str, torch.Tensor]]) -> set[str]:
        fitting = dict(part)
        tied = is_tied(model)
        if tied:
            fitting.pop(HEAD, None)  # as at a start, the embedding's copy is the one in use
        check_part(fitting, self.stored)
        if tied and EMBEDDING in fitting:
            # On a CPU the head has a packed copy of its own.
            fitting[HEAD] = fitting[EMBEDDING]
        layers = {name: self._layer(name) for name in fitting}
        for name, tensor in fitting.items():
            self.waiting.setdefault(layers[name], {})[name] = tensor
        whole = {layer: self.waiting.pop(layer) for layer in set(layers.values()) if self._is_whole(layer)}
        taken = self._load_layers(model, whole) - ({HEAD} if tied else set())
        for name, layer in layers.items():
            if layer in self.waiting:
                # The sender may use the memory of a part again.
                self.waiting[layer][name] = fitting[name].clone()
                taken.update(self.mapper.apply_list([name]) if not layer.endswith(".experts") else ())
        return taken

    def _layer(self, name: str) -> str:
        """The model's name of the layer that holds a checkpoint's tensor."""
        decoder_layer, experts, _ = name.partition(".experts.")
        if experts:
            return f"{decoder_layer}.experts"
        (served,) = self.mapper.apply_list([name])
        return served.rpartition(".")[0]

    def _is_whole(self, layer: str) -> bool:
        # A tied head stands in no checkpoint.
        return self.waiting[layer].keys() == self.names.get(layer, {HEAD})

    def _load_layers(self, model: nn.Module, whole: dict[str, dict[str, torch.Tensor]]) -> set[str]:
        layers = [model.get_submodule(layer) for layer in whole]
        config = self.vllm_config.model_config
        # As at a start: quantization methods ask for both.
        dtype = cast(torch.dtype, config.dtype)  # vLLM has made it one
        with set_current_vllm_config(self.vllm_config), set_default_torch_dtype(dtype), scales_kept():
            for layer in layers:
                pack_experts_again(layer)
                initialize_layerwise_reload(layer)
            tensors = [pair for layer in whole.values() for pair in layer.items()]
            loaded = AutoWeightsLoader(model).load_weights(tensors, mapper=self.mapper)
            for layer in layers:
                finalize_layerwise_reload(layer, config)
        return loaded


def parts(weights: Weights) -> Iterator[Sequence[tuple[str, torch.Tensor]]]:
    """What is checked together before any of it is loaded."""
    part: list[tuple[str, torch.Tensor]] = []
    is_one_part = isinstance(weights, Sequence)
    for name, tensor in weights:
        part.append((name, tensor))
        if not is_one_part and tensor.device.type != "cpu":
            yield part
            part = []
    if part:
        yield part


def give_back(model: nn.Module) -> None:
    """Serve again what a layer had before vLLM's update set it aside, in all layers that have not been loaded since."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if not info.can_load():
            continue
        _place_kernel_tensors(layer, info)
        for name in info.restore_metadata[0]:
            if not hasattr(layer, name):  # packed elsewhere: its kernel asks for it all the same
                layer.register_parameter(name, None)
        info.reset()


def is_tied(model: nn.Module) -> bool:
    """Whether head and embedding share their memory, as a config or vLLM's look at the checkpoint wants it."""
    head, embedding = (served_weight(model.get_submodule(name.rpartition(".")[0])) for name in (HEAD, EMBEDDING))
    return head is embedding


def served_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer that vLLM may have set aside during an update."""
    set_aside = get_layerwise_info(layer).kernel_tensors
    return set_aside[0]["weight"] if set_aside else cast(torch.Tensor, layer.weight)
