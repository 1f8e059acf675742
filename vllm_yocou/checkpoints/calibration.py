"""A closed-form start for an upcycled Llama: fitting.py makes it follow the Llama on some text, without gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from vllm_yocou.checkpoints.fitting import Fit
from vllm_yocou.checkpoints.plan import Plan
from vllm_yocou.checkpoints.tensors import SourceTensor
from vllm_yocou.config_keys import KEYS
from vllm_yocou.reference import YocoUForCausalLM

READ = 1 << 16  # characters at a time
REFITTED = "refitted"


@dataclass(frozen=True)
class Calibration:
    """How a start is fitted.

    Attributes:
        text: a file of prose in UTF-8, from whose beginning tokens are taken.
        tokens: how many, rounded down to whole rows of `row`.
        ridge, self_ridge: how much the copied weights count, in the cross-decoder and in the self-decoder.
        iterations: every T that the model is fitted for; None is its own alone.
    """

    text: Path
    tokens: int = 32768
    row: int = 512
    ridge: float = 0.1
    self_ridge: float = 0.01
    iterations: Sequence[int] | None = None


def calibrated(
    plan: Plan, layers: Sequence[tuple[str, int, int | None]], asked: Calibration, done: Callable[[float], None]
) -> Plan:
    """The plan with refitted weights in the place of copied ones.

    It takes the memory of both models in float32, of some three vectors of D numbers for each token and T, and in
    float64 that of three square matrices as wide as the feed-forward.

    Args:
        layers: as in `mapping.Source`.
        done: is told the share of the work that is behind, from 0 to 1.

    Raises:
        ValueError: the text cannot be read or is too short, the source has no tokenizer of its own, the cross layers do
            not follow its stream to the end, or the iterations are none that the model could have.
    """
    first = plan.config.num_self_decoder_layers
    cross_from = [feed_forward for _, _, feed_forward in layers[first + 1 :] if feed_forward is not None]
    last = LlamaConfig.from_pretrained(plan.source).num_hidden_layers - 1
    if cross_from != sorted(set(cross_from)) or cross_from[-1] != last:
        raise ValueError(
            f"--calibrate cannot be used with cross layers from {', '.join(map(str, cross_from))}: each is fitted to "
            f"what its source layer leaves, name layers in their order that end with {last}."
        )
    own = plan.config.num_iterations
    iterations = list(asked.iterations or [own])
    if complaint := KEYS["trained_iterations"].complaint(iterations):
        raise ValueError(f"--calibration-iterations is {iterations}: {complaint}.")
    if own not in iterations:
        raise ValueError(f"--calibration-iterations leaves out {own}, the T of the model: name it too.")
    rows_RN = read_rows(plan, asked)
    student = planned_model(plan)
    source = LlamaForCausalLM.from_pretrained(plan.source, dtype=torch.float32).eval()
    fit = Fit(student, source, rows_RN, done)
    fit.run(cross_from, sorted(set(iterations)), asked.ridge, asked.self_ridge)
    steps = [
        replace(step, tensor=SourceTensor.mapped(fit.changed[step.target]), change=REFITTED)
        if step.target in fit.changed
        else step
        for step in plan.steps
    ]
    return replace(plan, steps=steps)


def planned_model(plan: Plan) -> YocoUForCausalLM:
    """The model that `plan` would write, in float32."""
    model = YocoUForCausalLM(plan.config).eval()
    weights = {step.target: step.tensor.read().float() for step in plan.steps}
    model.load_state_dict(weights, strict=not plan.config.tie_word_embeddings)
    model.tie_weights()
    return model


def read_rows(plan: Plan, asked: Calibration) -> torch.Tensor:
    """The first tokens of the text as rows (R, N), each of which begins as the tokenizer begins a text."""
    vocabulary = plan.config.vocab_size
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(plan.source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"calibration needs the tokenizer of {plan.source}, which does not load ({str(error).splitlines()[0]}): "
            "put it there."
        ) from None
    if not vocabulary // 2 < len(tokenizer) <= vocabulary:
        raise ValueError(
            f"the tokenizer of {plan.source} has {len(tokenizer)} tokens and the model {vocabulary}: put its own there."
        )
    begin = tokenizer("", verbose=False)["input_ids"]
    row = min(asked.row, asked.tokens, plan.config.max_position_embeddings) - len(begin)
    if row < 1:
        raise ValueError(
            f"{asked.tokens} tokens of calibration leave none after the one that begins a text: take more."
        )
    wanted = max(1, asked.tokens // (row + len(begin))) * row
    ids: list[int] = []
    try:
        with asked.text.open(encoding="utf-8") as file:
            while len(ids) < wanted and (piece := file.read(READ)):
                ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    except UnicodeDecodeError:
        raise ValueError(f"{asked.text} is not text in UTF-8: give a file of prose.") from None
    if len(ids) < wanted:
        raise ValueError(f"{asked.text} has {len(ids)} tokens and calibration takes {wanted}: give more text.")
    rows = torch.tensor(ids[:wanted]).view(-1, row)
    return torch.cat([torch.tensor(begin, dtype=rows.dtype).expand(len(rows), -1), rows], dim=1)
