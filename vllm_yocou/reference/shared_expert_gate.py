"""Whether shared experts have a sigmoid gate: the config says so, or else the weights that are loaded.

transformers builds a model before it reads weights. So a model that is about to get them has gates where its config
says nothing, and loses them again if the weights that it gets, wherever they lie, hold none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn
from transformers.utils.loading_report import LoadStateDictInfo

from vllm_yocou.config import YocoUConfig
from vllm_yocou.reference.feed_forward import MoE

GATE = ".shared_expert_gate."
_weights_follow = ContextVar("weights_follow", default=False)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Around the construction of a model that gets its weights next."""
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


def left_to_weights(config: YocoUConfig) -> bool:
    """Whether the weights that follow decide. Either way the config says from now on what the model has."""
    if not config.leaves_gate_to_weights:
        return False
    config.shared_expert_gate = _weights_follow.get()
    return config.shared_expert_gate


def decide(model: nn.Module, config: YocoUConfig, undecided: bool, loaded: LoadStateDictInfo) -> None:
    """Take the gates away of which nothing was loaded, if that was left to the weights.

    Args:
        config: the model's own, which says from now on what the weights hold.
        undecided: what `left_to_weights` returned when the model was built.
        loaded: what transformers says of the weights; gates that are taken away are not missing.

    Raises:
        ValueError: the weights hold the gates of some layers only, or contradict the config.
    """
    gates = {name for name, _ in model.named_parameters() if GATE in name}
    missing = {name for name in loaded.missing_keys if GATE in name}
    unexpected = {name for name in loaded.unexpected_keys if GATE in name}
    if undecided and gates and missing == gates:
        for layer in model.modules():
            if isinstance(layer, MoE):
                layer.drop_gate()
        loaded.missing_keys -= missing
        config.shared_expert_gate = False
    elif missing:
        reason = "others of its gates are there" if undecided else "shared_expert_gate is true in its config"
        remedy = "fetch or convert it again" if undecided else "set it to false or convert the checkpoint again"
        raise ValueError(f"the checkpoint lacks {_first_of(missing)}, and {reason}: {remedy}.")
    elif unexpected:
        said = str(config.shared_expert_gate).lower()
        raise ValueError(
            f"the checkpoint holds {_first_of(unexpected)}, and shared_expert_gate is {said} in its config: set it to "
            "true or convert the checkpoint again."
        )


def _first_of(names: set[str]) -> str:
    first, *others = sorted(names)
    return first + (f" and {len(others)} more" if others else "")
