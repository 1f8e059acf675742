"""Imports between the rooms of the package run one way: a room imports only what lies on a lower floor."""

import ast
from pathlib import Path

from harness.checkout import ROOT

# From the ground up; a room is a module at the root or a package.
FLOORS = (
    {"__init__", "auto_classes", "options", "config_keys", "workarounds", "kernels"},
    {"rope", "rows", "seams"},
    {"architecture"},
    {"config"},
    {"reference"},
    {"checkpoints"},
    {"serving"},
    {"self_check"},
    {"cli"},
    {"registration"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def files() -> list[tuple[str, Path]]:
    """(room, file) of every module, kernels/ included, which installs as a package of this one."""
    package = ROOT / "vllm_yocou"
    ours = [(file.relative_to(package).parts[0].removesuffix(".py"), file) for file in package.rglob("*.py")]
    return [*ours, *(("kernels", file) for file in (ROOT / "kernels").glob("*.py"))]


def imported_rooms(source: str) -> set[str]:
    """Rooms that a module imports anywhere, in functions and for type checkers too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "vllm_yocou":
            names += [f"vllm_yocou.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides its room"
            names.append(node.module or "")
    found = {name.split(".")[1] for name in names if name.startswith("vllm_yocou.")}
    return {room if room in FLOOR else "__init__" for room in found}


def uphill(room: str, source: str) -> set[str]:
    return {other for other in imported_rooms(source) - {room} if FLOOR[other] >= FLOOR[room]}


def test_every_room_has_a_floor():
    assert {room for room, _ in files()} == set(FLOOR)


def test_imports_run_one_way():
    assert {str(file): found for room, file in files() if (found := uphill(room, file.read_text()))} == {}


def test_an_import_that_runs_back_up_is_seen():
    source = "def late():\n    from vllm_yocou.serving.model import YocoUModel\n    import vllm_yocou.cli.sizing\n"
    assert uphill("rows", source) == {"serving", "cli"}
    assert uphill("registration", source) == set()
    assert imported_rooms("from vllm_yocou import __version__, config") == {"__init__", "config"}
