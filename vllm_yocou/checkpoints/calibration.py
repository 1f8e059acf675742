"""A closed-form start for an upcycled Llama: its residual stream is made to follow the source's, without gradients.

Layer by layer, ridge regression towards the copied weights refits what a cross layer adds to the stream: the output
projection of its attention, then that of its feed-forward. Before that, the global keys and values may be fitted to
those of the source's layer that they come from. Each fit sees what all earlier ones left over, and is exact: of all
matrices W it finds the one with the smallest |X W' - Y|^2 + r |W - W0|^2, where r is `ridge` times the mean of the
diagonal of X'X (Hoerl and Kennard 1970, about W0 instead of about 0).

Shapes: R rows of N tokens, D hidden_size, C cross layers, M rows of a regression, I inputs and O outputs of a matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from vllm_yocou.checkpoints.plan import Plan
from vllm_yocou.checkpoints.tensors import SourceTensor
from vllm_yocou.reference import YocoUForCausalLM

READ = 1 << 16  # characters at a time
REFITTED = "refitted"


@dataclass(frozen=True)
class Calibration:
    """How a start is fitted.

    Attributes:
        text: a file of prose in UTF-8, from whose beginning tokens are taken.
        tokens: how many, rounded down to whole rows of `row`.
        ridge: how much the copied weights count.
        global_kv: whether the global keys and values are fitted, too.
    """

    text: Path
    tokens: int = 8192
    row: int = 512
    ridge: float = 0.1
    global_kv: bool = False


def calibrated(
    plan: Plan, layers: Sequence[tuple[str, int, int | None]], asked: Calibration, done: Callable[[float], None]
) -> Plan:
    """The plan with refitted weights in the place of copied ones.

    It takes the memory of both models in float32, of 2 C vectors of D numbers for each token, and in float64 that of
    three square matrices as wide as the feed-forward.

    Args:
        layers: as in `mapping.Source`.
        done: is told the share of the work that is behind, from 0 to 1.

    Raises:
        ValueError: the text cannot be read or is too short, the source has no tokenizer of its own, or the cross layers
            do not follow its stream to the end.
    """
    first = plan.config.num_self_decoder_layers
    cross_from = [feed_forward for _, _, feed_forward in layers[first + 1 :] if feed_forward is not None]
    last = LlamaConfig.from_pretrained(plan.source).num_hidden_layers - 1
    if cross_from != sorted(set(cross_from)) or cross_from[-1] != last:
        raise ValueError(
            f"--calibrate cannot be used with cross layers from {', '.join(map(str, cross_from))}: each is fitted to "
            f"what its source layer leaves, name layers in their order that end with {last}."
        )
    rows_RN = read_rows(plan, asked)
    student = planned_model(plan)
    source = LlamaForCausalLM.from_pretrained(plan.source, dtype=torch.float32).eval()
    changed = fit(student, source, layers[first][1], cross_from, rows_RN, asked, done)
    steps = [
        replace(step, tensor=SourceTensor.mapped(changed[step.target]), change=REFITTED)
        if step.target in changed
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


@torch.no_grad()
def fit(
    student: YocoUForCausalLM,
    source: LlamaForCausalLM,
    global_from: int,
    cross_from: Sequence[int],
    rows_RN: torch.Tensor,
    asked: Calibration,
    done: Callable[[float], None] = lambda share: None,
) -> dict[str, torch.Tensor]:
    """Refit `student` in place, so that it follows `source`; returns the new weights, by name.

    Args:
        global_from: the source layer of the global keys and values.
        cross_from: for each cross layer, the source layer whose stream it follows.
    """
    cross_layers = student.model.cross_decoder.layers
    parts, behind = 2 * len(rows_RN) + 2 * len(cross_layers), 0

    def step() -> None:
        nonlocal behind
        behind += 1
        done(behind / parts)

    aims = Aims(source, global_from, cross_from)
    for row in rows_RN:
        aims.add(row)
        step()
    streams, rotation, mask = [], None, None
    for row in rows_RN:
        with noted(cross_layers[0]) as calls:
            student.model(row[None], use_cache=False)
        x_1ND, _, _, rotation, mask = calls[0]
        streams.append(x_1ND)
        step()
    changed = {}

    def refit(name: str, x_MI: torch.Tensor, y_MO: torch.Tensor) -> nn.Module:
        linear = student.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(ridge_regression(x_MI, y_MO, linear.weight, asked.ridge))
        changed[f"{name}.weight"] = linear.weight.detach()
        return linear

    global_kv = student.model.global_kv
    if asked.global_kv:
        g_MD = torch.cat([global_kv.norm(x_1ND)[0] for x_1ND in streams])
        for projection, aim in (("k_proj", aims.keys), ("v_proj", aims.values)):
            refit(f"model.global_kv.{projection}", g_MD, torch.cat(aim))
    keys_values = [global_kv(x_1ND, rotation) for x_1ND in streams]

    def follow(name: str, calls: list[tuple], aim: list[torch.Tensor]) -> None:
        """Refit the projection `name`, which was called with `calls`, and let the streams go through it.

        A token counts by what it misses of its own stream: the norm after it undoes its size, and that of a row's first
        token may be a thousand times the others'.
        """
        inputs = [given[0][0] for given in calls]
        missing = [aim_ND - x_1ND[0] for aim_ND, x_1ND in zip(aim, streams, strict=True)]
        size_M1 = torch.cat(aim).square().mean(-1, keepdim=True).sqrt()
        linear = refit(name, torch.cat(inputs) / size_M1, torch.cat(missing) / size_M1)
        for row, x_NI in enumerate(inputs):
            streams[row] = streams[row] + linear(x_NI)
        step()

    for j, layer in enumerate(cross_layers):
        here = f"model.cross_decoder.layers.{j}"
        with noted(layer.cross_attn.o_proj) as calls:
            for x_1ND, (k_1KNd, v_1KNd) in zip(streams, keys_values, strict=True):
                layer.cross_attn(layer.input_layernorm(x_1ND), k_1KNd, v_1KNd, rotation, mask)
        follow(f"{here}.cross_attn.o_proj", calls, aims.attended[j])
        with noted(layer.mlp.down_proj) as calls:
            for x_1ND in streams:
                layer.mlp(layer.post_attention_layernorm(x_1ND))
        follow(f"{here}.mlp.down_proj", calls, aims.left[j])
    return changed


class Aims:
    """What the source computes for each row of tokens.

    Attributes:
        keys, values: a row's projections (N, K · d) in the layer of the global keys and values, not yet rotated.
        attended, left: for each cross layer, the stream (N, D) of a row after the attention and after the feed-forward
            of the source layer that it follows.
    """

    def __init__(self, source: LlamaForCausalLM, global_from: int, cross_from: Sequence[int]):
        self.source = source
        self.attention = source.model.layers[global_from].self_attn
        self.followed = [source.model.layers[layer] for layer in cross_from]
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.attended: list[list[torch.Tensor]] = [[] for _ in self.followed]
        self.left: list[list[torch.Tensor]] = [[] for _ in self.followed]

    def add(self, row_N: torch.Tensor) -> None:
        def note(aim: list[torch.Tensor], index: int) -> Callable[..., None]:
            return lambda module, given, returned: aim.append((given[0] if index else returned).detach()[0])

        hooks = [
            self.attention.k_proj.register_forward_hook(note(self.keys, 0)),
            self.attention.v_proj.register_forward_hook(note(self.values, 0)),
        ]
        for layer, attended, left in zip(self.followed, self.attended, self.left, strict=True):
            hooks.append(layer.post_attention_layernorm.register_forward_hook(note(attended, 1)))
            hooks.append(layer.register_forward_hook(note(left, 0)))
        try:
            self.source.model(row_N[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def noted(module: nn.Module) -> Iterator[list[tuple]]:
    """The arguments of each call of `module`, as they come."""
    calls: list[tuple] = []
    hook = module.register_forward_pre_hook(lambda module, given: calls.append(given))
    try:
        yield calls
    finally:
        hook.remove()


def ridge_regression(x_MI: torch.Tensor, y_MO: torch.Tensor, start_OI: torch.Tensor, ridge: float) -> torch.Tensor:
    """The weight (O, I) that maps x to y best, drawn towards `start_OI`; computed in float64.

    `ridge` is a share of the mean of what the columns of x have as sums of squares.
    """
    x, y, start = x_MI.double(), y_MO.double(), start_OI.double()
    gram_II = x.T @ x
    weight = ridge * gram_II.diagonal().mean()
    gram_II.diagonal().add_(weight)
    return torch.linalg.solve(gram_II, x.T @ y + weight * start.T).T.to(start_OI.dtype)
