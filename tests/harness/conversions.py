"""Foreign checkpoints through the converter, and what the reference model makes of the result."""

import torch

from harness import foreign_sources as sources
from vllm_yocou.checkpoints.plan import Plan
from vllm_yocou.checkpoints.plan import plan as plan_of
from vllm_yocou.checkpoints.sources import recognise
from vllm_yocou.checkpoints.write import write
from vllm_yocou.reference import YocoUForCausalLM

TOKENS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def planned(source, destination, dtype=None, context=None) -> Plan:
    return plan_of(recognise("convert", source, context), destination, dtype)


def convert(source, destination, shard_bytes=1 << 30, **settings) -> Plan:
    plan = planned(source, destination, **settings)
    write(plan, shard_bytes, lambda written: None)
    return plan


def converted_logits(folder, dtype=torch.float32) -> torch.Tensor:
    with torch.inference_mode():
        return YocoUForCausalLM.from_pretrained(folder, dtype=dtype).eval()(torch.tensor([TOKENS])).logits[0]


def save_changed(folder, keys=(), tensors=(), config=sources.AUTHORS) -> None:
    """The authors' checkpoint with some keys of its config and some tensors changed; None leaves a tensor out."""
    sources.save_authors(folder, config | dict(keys), changed(sources.authors_weights(config), tensors))


def save_changed_state(folder, keys=(), tensors=(), config=sources.AUTHORS) -> None:
    """The same of a state dict of the authors' trainer, by the trainer's names."""
    state = sources.trainer_weights(config, sources.authors_weights(config))
    sources.save_trainer(folder, config | dict(keys), changed(state, tensors))


def changed(weights, tensors) -> dict[str, torch.Tensor]:
    weights = weights | dict(tensors)
    return {name: tensor for name, tensor in weights.items() if tensor is not None}
