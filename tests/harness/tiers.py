"""When a test runs and with which others: both follow from the fixtures that it uses. A pytest plugin.

`make check` runs what is neither "engine" nor "slow", `make test` what is not "slow", `make test-all` everything.
"""

import pytest

# Whoever uses one of these starts vLLM or Ray, trains a model, or runs in Triton's interpreter.
ENGINE = {"engine", "module_engine", "server", "engine_processes", "starts_vllm", "both_cores", "interpreted", "trains"}
SLOW = {"nightly"}
# The group of everything that runs two engines or two ranks: one such test at a time.
BOTH_CORES = "both cores"


# Before pytest selects by markers and pytest-xdist reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        for tier in tiers(item):
            item.add_marker(tier)
        if name := group(item):
            item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=place)


@pytest.fixture(scope="session")
def starts_vllm() -> None:
    """Asked for by a test that starts vLLM in a way of its own: an example, a benchmark, a server."""


@pytest.fixture(scope="session")
def trains() -> None:
    """Asked for by a test that trains or compiles for many seconds, without an engine."""


@pytest.fixture(scope="session")
def both_cores() -> None:
    """Asked for where two engines, two ranks or Ray's workers run at a time: of such tests, one runs at a time."""


@pytest.fixture(scope="session")
def nightly() -> None:
    """Asked for by what `make test` leaves to `make test-all`: long runs, and variants of what another test holds."""


def tiers(item: pytest.Item) -> list[str]:
    """Names of the markers "engine" and "slow", as far as they apply; one parameter of many is marked slow by hand."""
    used = set(getattr(item, "fixturenames", ()))
    return [tier for tier, of_tier in (("engine", ENGINE), ("slow", SLOW)) if used & of_tier]


def group(item: pytest.Item) -> str | None:
    """The xdist group: tests that share one worker, so that what they share is started once; None for no group."""
    from harness.runners import RUNNERS

    used, values = getattr(item, "fixturenames", ()), parameters(item)
    runner = next((value for value in values.values() if isinstance(value, str) and value in RUNNERS), "v1")
    if "both_cores" in used or ("engine_processes" in used and runner.startswith("two-ranks")):
        return BOTH_CORES
    if "engine_processes" in used:
        return f"runner {runner}"
    if "server" in used:
        return "server"
    module = f"{item.path.parent.name}/{item.path.stem}"
    if "module_engine" in used:
        # One engine for a module, or for each value of a fixture's parameter.
        return " ".join([module, *(str(values[name]) for name in sorted(set(values) - own_parameters(item)))])
    return None if "engine" in used or "interpreted" in used else module


def parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def own_parameters(item: pytest.Item) -> set[str]:
    """Those that the test's own `parametrize` sets; the others are its fixtures'."""
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    return {name.strip() for given in names for name in (given.split(",") if isinstance(given, str) else given)}


def place(item: pytest.Item) -> int:
    """A key that sorts tests: what takes longest first, so that no worker ends long after the other."""
    marker = item.get_closest_marker("xdist_group")
    name = marker.args[0] if marker else None
    if not item.get_closest_marker("engine"):
        return 4
    return {BOTH_CORES: 0, "server": 1, None: 3}.get(name, 2)
