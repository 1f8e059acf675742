"""Distillation is the loss of a step: what keeps a student from its source, for whichever T the step has.

    (1 - next) * t^2 * KL(source || student, both at temperature t) + next * (next-token loss) + hidden * (distance)

in nats per token (Hinton, Vinyals and Dean 2015 for the temperature t). The distance is between the streams before the
last layers of both: a token's squared difference relative to the square of the source's, averaged over tokens and
layers. Evaluation takes the next-token loss alone.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_callback import TrainerState

from vllm_yocou.config import YocoUConfig

# What a run may train: the parameters whose names have one of these parts.
TRAINED = {"attention": ("global_kv", "cross_attn"), "cross": ("global_kv", "cross_decoder"), "all": ("",)}


@dataclass(frozen=True)
class Terms:
    """The terms of the loss.

    Attributes:
        next_token, temperature, hidden: as in this module's docstring.
        layers: from the last one back, those before which streams are compared.
    """

    next_token: float
    temperature: float
    hidden: float
    layers: int


class Distillation(Trainer):
    """A Trainer whose student learns from `teacher`, in each step with one of `iterations` as its T."""

    def __init__(self, *, teacher: PreTrainedModel, terms: Terms, iterations: list[int], **settings: Any):
        super().__init__(**settings)
        self.teacher = teacher.to(self.args.device)  # type: ignore[arg-type]  # transformers hides that it is a method
        self.terms, self.iterations = terms, iterations
        # All rows have one length, so the mean over a batch is divided by the accumulation steps alone.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if not model.training:
            student = model(**inputs, use_cache=False)
            return (student.loss, student) if return_outputs else student.loss
        terms, config = self.terms, self.accelerator.unwrap_model(model).config
        # All devices draw the same T, and so does a run that goes on from here.
        drawn = random.Random(f"{self.args.seed}, {self.state.global_step}").choice(self.iterations)
        settings = dict(use_cache=False, output_hidden_states=bool(terms.hidden))
        with iterating(config, drawn):
            student = model(**inputs, **settings)
        with torch.no_grad():
            teacher = self.teacher(**{key: value for key, value in inputs.items() if key != "labels"}, **settings)
        ours, theirs = (
            (it.logits.float() / terms.temperature).log_softmax(-1).flatten(0, 1) for it in (student, teacher)
        )
        divergence = terms.temperature**2 * kl_div(ours, theirs, reduction="batchmean", log_target=True)
        total = terms.next_token * student.loss + (1 - terms.next_token) * divergence
        if terms.hidden:
            # The last state is that after the norm; before it is the input of the last layer.
            pairs = [(student.hidden_states[-1 - n].float(), teacher.hidden_states[-1 - n].float())
                     for n in range(1, terms.layers + 1)]  # fmt: skip
            distances = [((a - b).square().mean(-1) / b.square().mean(-1)).mean() for a, b in pairs]
            total = total + terms.hidden * torch.stack(distances).mean()
        return (total, student) if return_outputs else total


@contextmanager
def iterating(config: YocoUConfig, iterations: int) -> Iterator[None]:
    """T of the model whose `config` this is."""
    own, config.num_iterations = config.num_iterations, iterations
    try:
        yield
    finally:
        config.num_iterations = own


def train_only(model: nn.Module, trained: str) -> None:
    """Freeze all parameters but those of TRAINED[`trained`]."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED[trained]))


class StepClock(TrainerCallback):
    """Seconds spent in steps, without evaluation and saving, and the tokens of all devices in them."""

    def __init__(self) -> None:
        self.s, self.tokens, self.started_s, self.seen = 0.0, 0, 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.seen = state.num_input_tokens_seen

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started_s = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.s += time.perf_counter() - self.started_s
        # The last step of a pass over the text takes what is left of it.
        self.tokens, self.seen = self.tokens + state.num_input_tokens_seen - self.seen, state.num_input_tokens_seen
