"""Row skipping has two hand-overs; each is one typed slot with one writer and one reader, and both stand here.

    a runner's hook -- RequestTable --> the row selection -- StepRows --> the model and its kernels
    v1_runner.py,      who wants        selection.py, called   which      serving/model.py,
    v2_runner.py       what             by a metadata builder  rows run   serving/fused_attention.py

Both slots belong to the global cache, since all layers that run on fewer rows read that one cache: a `RowOwner` among
vLLM's cached layers has them in `rows`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_yocou.rows.prefill_node import PrefillNode

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

NEVER = np.iinfo(np.int64).max


class RequestTable:
    """What the selection knows of each running request, by the index that the model runner gives it.

    Until a runner's hook fills it, nobody knows who wants prompt log probabilities, and every row runs.

    Attributes:
        prefill_node: what the engine answers if it only computes caches for others.
        filled: whether a hook tells it of every request.
        wants_prompt: (requests,) bool, whether the request wants log probabilities of its prompt.
        prefill_length: (requests,) int64, tokens before the first that is sampled for somebody.
        warms_up: (requests,) bool, whether vLLM made the request up, to warm up before the first user's.
    """

    def __init__(self, capacity: int, prefill_node: PrefillNode | None = None):
        self.prefill_node = prefill_node
        self.filled = False
        self.wants_prompt = np.zeros(capacity, dtype=bool)
        self.prefill_length = np.zeros(capacity, dtype=np.int64)
        self.warms_up = np.zeros(capacity, dtype=bool)

    def fill(self) -> None:
        """Called by a runner's hook, which from now on tells the table of every request."""
        self.filled = True

    def add(self, index: int, params: "SamplingParams | None", prefill_length: int, warms_up: bool = False) -> None:
        """A `prefill_length` of 0, where it is unknown, makes every row run."""
        self.wants_prompt[index] = params is not None and (
            params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
        )
        unread = self.prefill_node is not None and self.prefill_node.answers(params)
        self.prefill_length[index] = NEVER if unread else prefill_length
        self.warms_up[index] = warms_up

    def move(self, source: int, target: int) -> None:
        for column in (self.wants_prompt, self.prefill_length, self.warms_up):
            column[target] = column[source]

    def swap(self, one: int, other: int) -> None:
        for column in (self.wants_prompt, self.prefill_length, self.warms_up):
            column[[one, other]] = column[[other, one]]


@dataclass(frozen=True)
class StepRows:
    """The rows of one step that run through the cross-decoder, where these are fewer than all.

    Attributes:
        rows_M: (M,) int64 on the model's device, indices into the step's N rows, ascending.
        most: the largest number of selected rows in any one request.
    """

    rows_M: torch.Tensor
    most: int


class RowSlots:
    """The two slots of one engine.

    Attributes:
        requests: written by the runner's hook before a step, read when the step's rows are selected.
        map_adapters: called with the selected rows (M,) as soon as they are known; set where LoRA is on.
    """

    def __init__(self, capacity: int, prefill_node: PrefillNode | None = None):
        self.requests = RequestTable(capacity, prefill_node)
        self.map_adapters: Callable[[np.ndarray], None] | None = None
        self._metadata: object = None
        self._step: StepRows | None = None
        self._wanted = 0

    def put(self, metadata: object, step: StepRows | None, wanted: int) -> None:
        """Set by the global cache's metadata builder, with the attention metadata that it built.

        Args:
            step: None for all rows.
            wanted: how many rows of the step somebody reads.
        """
        self._metadata, self._step, self._wanted = metadata, step, wanted

    def of(self, metadata: object) -> StepRows | None:
        """Read by the model and its kernels, with the attention metadata that they are given; None for all rows.

        Raises:
            RuntimeError: the metadata is not that of the step whose rows were selected, so queries would go to wrong
                keys. No vLLM that is supported does that.
        """
        if self._step is not None:
            self._check(metadata)
        return self._step

    def wanted_of(self, metadata: object) -> int:
        """How many rows of the step somebody reads; none where vLLM runs it without metadata.

        Raises:
            RuntimeError: as for `of`.
        """
        if metadata is None:
            return 0
        self._check(metadata)
        return self._wanted

    def _check(self, metadata: object) -> None:
        if metadata is not self._metadata:
            raise RuntimeError(
                "the attention metadata of this step is not what YOCO-U's builder made for it, so its rows cannot be "
                'selected: set {"yocou": {"skip_rows": false}} in --additional-config.'
            )

    @property
    def none_runs(self) -> bool:
        """Whether no row of the step runs, so that whatever is sampled in it is thrown away."""
        return self._step is not None and not len(self._step.rows_M)


class RowOwner:
    """Mixed into the cached layer on whose rows the selection decides."""

    rows: RowSlots


def row_slots(vllm_config: "VllmConfig") -> list[RowSlots]:
    """The slots of each owner among the layers that are built by now: one in an engine of YOCO-U, none before."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    return [layer.rows for layer in layers if isinstance(layer, RowOwner)]
