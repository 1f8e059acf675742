"""The models that a server answers with: at any moment clients know which of them may answer a request."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random

from benchmarks.promises import Expected, Reference


@dataclass(frozen=True)
class Served:
    """A model by the name that requests give it, and what the reference says of a pool of prompts.

    The pools of all models have the same prompts in the same order.
    """

    name: str
    reference: Reference
    pool: list[Expected] = field(repr=False)


@dataclass(eq=False)
class Ticket:
    """A request under way: the model that it asked for, and all that may answer it under that name.

    Requests begin only while no model gives way to another: `Models.coming` is None.
    """

    model: Served
    possible: list[Served]


class Models:
    """What clients choose among; one task changes it while they run."""

    def __init__(self, *served: Served):
        self.choices = list(served)
        self.coming: Served | None = None
        self.under_way: list[Ticket] = []

    @contextmanager
    def asked(self, random: Random) -> Iterator[Ticket]:
        """A request for one of them, until its answer is there."""
        model = random.choice(self.choices)
        ticket = Ticket(model, [model])
        self.under_way.append(ticket)
        try:
            yield ticket
        finally:
            self.under_way.remove(ticket)

    def is_used(self, model: Served) -> bool:
        return any(ticket.model is model for ticket in self.under_way)

    @contextmanager
    def replaced_by(self, model: Served) -> Iterator[None]:
        """While the only model gives way to another of the same name, either may answer; afterwards, the other does."""
        self.coming = model
        for ticket in self.under_way:
            ticket.possible.append(model)
        yield
        self.choices, self.coming = [model], None
