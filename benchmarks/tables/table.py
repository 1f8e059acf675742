"""A `Table` says what can be measured, and how a recorded `Result` becomes rows; it measures nothing.

Nothing in this package imports torch or vLLM: rows, notes and pictures come from the recorded values alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.results import Result

Rows = tuple[list[str], list[list[Any]]]


@dataclass(frozen=True)
class Table:
    """Attributes:

    name: of its results' files.
    about: what it shows, in a few words.
    needs: what must be there: arguments, GPU, network, cores.
    takes: how long it takes on two cores.
    rows: the header and rows of a result.
    note: what was measured, in sentences, from a result's settings.
    module: of benchmarks/, that measures it; its name where it is "".
    arguments: of that module, which choose this table.
    by_default: `python -m benchmarks` runs it.
    has_options: its module takes arguments, which --help after its name lists.
    each_dtype: its module measures everything in each type; `rows` and `draw` get one type's part, `note` the whole.
    draw: draws a result into a matplotlib figure.
    picture: its text for readers who do not see it.
    """

    name: str
    about: str
    needs: str
    takes: str
    rows: Callable[[Result], Rows]
    note: Callable[[Result], str]
    module: str = ""
    arguments: tuple[str, ...] = ()
    by_default: bool = True
    has_options: bool = False
    each_dtype: bool = False
    draw: Callable[[Result, Any], None] | None = None
    picture: str = ""

    @property
    def command(self) -> tuple[str, ...]:
        return (f"benchmarks.{self.module or self.name}", *self.arguments)

    def parts(self, result: Result) -> list[Result]:
        """The result, or of one in several types each type's."""
        dtypes = result.keys("dtype") if self.each_dtype else []
        return [result.only(dtype) for dtype in dtypes] or [result]

    def whole(self, result: Result) -> Rows:
        """The rows of all parts; where they are of several types, the first column names these."""
        parts = self.parts(result)
        if len(parts) == 1:
            return self.rows(parts[0])
        lines = [[part.settings["dtype"], *line] for part in parts for line in self.rows(part)[1]]
        return ["", *self.rows(parts[0])[0]], lines


def cell(value: float | None, form: str = "", unit: str = "") -> str:
    """A number in a table, or "" for None."""
    return "" if value is None else f"{value:{form}}{unit}"


def over(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below
