"""A fitted model's residual stream follows its source's, as closely as the matrices that add to it can make it.

Layer by layer, ridge regression towards the copied weights refits the output projection of the attention, then that of
the feed-forward. Each fit sees what all earlier ones left over, and is exact: of all matrices W it finds the one with
the smallest |X W' - Y|^2 + r |W - W0|^2, where r is a share of the mean of the diagonal of X'X (Hoerl and Kennard 1970,
about W0 instead of about 0).

A model for several T has its self-decoder fitted first. Copied layers would transform again, in every further pass,
what they have transformed before. They are fitted to add in the first pass what they add there, and nothing to what
they have left. Then the cross layers are fitted to follow the source's after each of these T.

Source and student run side by side, one layer at a time: of each token only its streams are kept.

Shapes: R rows of N tokens, D hidden_size, I inputs and O outputs of a matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlamaForCausalLM

from vllm_yocou.reference import YocoUForCausalLM

Streams = list[torch.Tensor]  # (1, N, D) each
Add = Callable[[int, torch.Tensor], torch.Tensor]  # what a part of a layer adds to the stream of this number


class Fit:
    """A student that is refitted in place on rows of tokens, all of one length.

    Attributes:
        changed: the new weights so far, by name.
    """

    @torch.no_grad()
    def __init__(
        self,
        student: YocoUForCausalLM,
        source: LlamaForCausalLM,
        rows_RN: torch.Tensor,
        done: Callable[[float], None] = lambda share: None,
    ):
        """`done` is told the share of the work that is behind, from 0 to 1."""
        self.student, self.source, self.rows_RN, self.done = student, source, rows_RN, done
        self.changed: dict[str, torch.Tensor] = {}
        self.parts, self.behind = 0, 0
        model = student.model
        layers = model.self_decoder.layers[0], model.cross_decoder.layers[0], source.model.layers[0]
        with noted(layers[0]) as window, noted(layers[1]) as cross, noted(layers[2]) as of_source:
            model(rows_RN[:1], use_cache=False)
            source.model(rows_RN[:1], use_cache=False)
        # Rotations and masks, which all rows have in common.
        self.window, self.cross, self.of_source = window[0].args[2:4], cross[0].args[3:5], of_source[0].kwargs

    @torch.no_grad()
    def run(self, cross_from: Sequence[int], iterations: Sequence[int], ridge: float, self_ridge: float) -> None:
        """Fit the student for each T of `iterations`, the self-decoder only where it is not for its own T alone.

        Args:
            cross_from: for each cross layer, the source layer whose stream it follows; in their order.
            ridge, self_ridge: how much the copied weights count, in the cross-decoder and in the self-decoder.
        """
        cfg, rows = self.student.config, len(self.rows_RN)
        own, settles = cfg.num_iterations, [*iterations] != [cfg.num_iterations]
        self.parts = 2 * rows + 2 * cfg.num_cross_decoder_layers
        self.parts += (rows + 2 * cfg.num_self_decoder_layers) if settles else 0
        cfg.num_iterations = max(iterations)
        try:
            if settles:
                self._self_decoder(self_ridge)
            self._cross_decoder(cross_from, iterations, ridge)
        finally:
            cfg.num_iterations = own

    def _self_decoder(self, ridge: float) -> None:
        """Make every pass after the first leave the stream as it is."""
        copied = self._embedded()
        ends = []
        for x_1ND in copied:
            ends.append(self._pass(x_1ND))
            self._step()
        streams = copied + ends
        for i, layer in enumerate(self.student.model.self_decoder.layers):

            def attend(number: int, x_1ND: torch.Tensor, layer: Any = layer) -> torch.Tensor:
                return layer.self_attn(layer.input_layernorm(x_1ND), 0, *self.window, None)[0]

            here = f"model.self_decoder.layers.{i}"
            for name, add in (("self_attn.o_proj", attend), ("mlp.down_proj", partial(feed, layer))):
                copied = [x_1ND + add(number, x_1ND) for number, x_1ND in enumerate(copied)]
                streams = self._follow(f"{here}.{name}", add, streams, copied + ends, ridge)

    def _cross_decoder(self, cross_from: Sequence[int], iterations: Sequence[int], ridge: float) -> None:
        """Make the stream follow the source's."""
        cross_layers, layers = self.student.model.cross_decoder.layers, self.source.model.layers
        after: dict[int, Streams] = {T: [] for T in range(1, max(iterations) + 1)}
        for x_1ND in self._embedded():
            for streams in after.values():
                x_1ND = self._pass(x_1ND)
                streams.append(x_1ND)
            self._step()
        rotation, mask = self.cross
        streams = [x_1ND for T in iterations for x_1ND in after[T]]
        del after
        keys_values = [self.student.model.global_kv(x_1ND, rotation) for x_1ND in streams]
        theirs: Streams = []
        for row_N in self.rows_RN:
            x_1ND = self.source.model.embed_tokens(row_N[None])
            for layer in layers[: cross_from[0]]:
                x_1ND = layer(x_1ND, **self.of_source)
            theirs.append(x_1ND)
            self._step()
        for j, (layer, followed) in enumerate(zip(cross_layers, cross_from, strict=True)):

            def attend(number: int, x_1ND: torch.Tensor, layer: Any = layer) -> torch.Tensor:
                return layer.cross_attn(layer.input_layernorm(x_1ND), *keys_values[number], rotation, mask)[0]

            for passed in layers[cross_from[j - 1] + 1 if j else followed : followed]:
                theirs = [passed(x_1ND, **self.of_source) for x_1ND in theirs]
            here, copy = f"model.cross_decoder.layers.{j}", layers[followed]
            theirs = [x + copy.self_attn(copy.input_layernorm(x), **self.of_source)[0] for x in theirs]
            streams = self._follow(f"{here}.cross_attn.o_proj", attend, streams, theirs * len(iterations), ridge)
            theirs = [x + feed(copy, number, x) for number, x in enumerate(theirs)]
            streams = self._follow(
                f"{here}.mlp.down_proj", partial(feed, layer), streams, theirs * len(iterations), ridge
            )

    def _embedded(self) -> Streams:
        multiplier = self.student.config.embedding_multiplier
        return [self.student.model.embed_tokens(row_N[None]) * multiplier for row_N in self.rows_RN]

    def _pass(self, x_1ND: torch.Tensor) -> torch.Tensor:
        for layer in self.student.model.self_decoder.layers:
            x_1ND = layer(x_1ND, 0, *self.window, None)
        return x_1ND

    def _follow(self, name: str, add: Add, streams: Streams, aims: Streams, ridge: float) -> Streams:
        """Refit the projection `name`, which `add` ends with, and return the streams with what is then added.

        A token counts by what it misses of its own stream: the norm after it undoes its size, and that of a row's first
        token may be a thousand times the others'.
        """
        linear = self.student.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        regression = Regression(linear.in_features, linear.out_features)
        for number, (x_1ND, aim_1ND) in enumerate(zip(streams, aims, strict=True)):
            with noted(linear) as calls:
                add(number, x_1ND)
            size_N1 = aim_1ND[0].square().mean(-1, keepdim=True).sqrt()
            regression.add(calls[0].args[0][0] / size_N1, (aim_1ND - x_1ND)[0] / size_N1)
        linear.weight.copy_(regression.solve(linear.weight, ridge))
        self.changed[f"{name}.weight"] = linear.weight.detach()
        self._step()
        return [x_1ND + add(number, x_1ND) for number, x_1ND in enumerate(streams)]

    def _step(self) -> None:
        self.behind += 1
        self.done(self.behind / self.parts)


def feed(layer: Any, number: int, x_1ND: torch.Tensor) -> torch.Tensor:
    """What the feed-forward of a layer adds, in the student as in the source; an `Add` once `layer` is given."""
    return layer.mlp(layer.post_attention_layernorm(x_1ND))


class Regression:
    """Least squares from vectors of I to vectors of O, of which only sums are kept, in float64."""

    def __init__(self, inputs: int, outputs: int):
        self.gram_II = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.moments_IO = torch.zeros(inputs, outputs, dtype=torch.float64)

    def add(self, x_NI: torch.Tensor, y_NO: torch.Tensor) -> None:
        """N pairs more."""
        x, y = x_NI.double(), y_NO.double()
        self.gram_II += x.T @ x
        self.moments_IO += x.T @ y

    def solve(self, start_OI: torch.Tensor, ridge: float) -> torch.Tensor:
        """The weight (O, I) that maps x to y best, drawn towards `start_OI`.

        `ridge` is a share of the mean of what the columns of x have as sums of squares.
        """
        weight = ridge * self.gram_II.diagonal().mean()
        gram_II = self.gram_II + weight * torch.eye(len(self.gram_II), dtype=torch.float64)
        moments_IO = self.moments_IO + weight * start_OI.double().T
        return torch.linalg.solve(gram_II, moments_IO).T.to(start_OI.dtype)


class Call(NamedTuple):
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def noted(module: nn.Module) -> Iterator[list[Call]]:
    """The calls of `module`, as they come."""
    calls: list[Call] = []
    hook = module.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()
