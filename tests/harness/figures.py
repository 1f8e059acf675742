"""How exact the served model was: printed at the end of a run, whichever worker has measured it. A pytest plugin.

A test notes a figure, which its report takes to the process that prints.
"""

import os
from typing import NamedTuple

import pytest

PROPERTY = "exactness"


class Figure(NamedTuple):
    test: str
    difference: float  # largest |Δlogprob|; of a type of 16 bits its root mean square
    compared: int  # values
    rounding: float  # the reference's own, from float64; of a type of 16 bits from float32

    def __str__(self) -> str:
        return (
            f"|Δlogprob| <= {self.difference:.1e} of {self.compared:5} values, "
            f"reference's rounding {self.rounding:.1e}: {self.test}"
        )


noted: list[Figure] = []  # by the test that runs
reported: list[Figure] = []  # by all tests so far


def note(difference: float, compared: int, rounding: float) -> None:
    """Keep a figure of the test that runs."""
    test = os.environ["PYTEST_CURRENT_TEST"].rsplit(" ", 1)[0]
    # pytest-xdist puts a test's group after its name.
    if test.rfind("@") > test.rfind("]"):
        test = test.rsplit("@", 1)[0]
    noted.append(Figure(test, difference, compared, rounding))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    if call.when == "call":
        # Plain tuples: pytest-xdist sends nothing else.
        item.user_properties += [(PROPERTY, tuple(figure)) for figure in noted]
        noted.clear()


def pytest_runtest_logreport(report):
    if report.when == "call":
        reported.extend(Figure(*value) for name, value in report.user_properties if name == PROPERTY)


def pytest_terminal_summary(terminalreporter):
    if reported:
        terminalreporter.section("served model against the reference; test_half_precision: root mean squares")
        for figure in sorted(reported):
            terminalreporter.write_line(str(figure))
