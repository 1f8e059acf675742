"""The table of seams is whole: what the plugin imports, calls and overrides in vLLM stands in it, and is there."""

import ast
import importlib
import inspect
from collections.abc import Iterator

import pytest
from harness.checkout import ROOT
from vllm.version import __version_tuple__

from vllm_yocou.seams.seam import Seam
from vllm_yocou.seams.table import SEAMS as OF_SERVING
from vllm_yocou.seams.table import SELF_CHECK

SEAMS = OF_SERVING + SELF_CHECK
PACKAGE = ROOT / "vllm_yocou"
FILES = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "seams"]
# Modules with classes that extend vLLM's. The mixins of serving.backend and serving.fused_attention have no base of
# vLLM's; their methods' parameters stand in seams of their own.
BUILT_ON_VLLMS = (
    "rows.v1_runner",
    "rows.v2_runner",
    "serving.caches",
    "serving.engine_settings",
    "serving.fixed_tiles",
    "serving.heads",
    "serving.invariant_worker",
    "serving.layers",
    "serving.looped_experts",
    "serving.model",
    "serving.rope",
)
BY_PLACE = {place: seam for seam in SEAMS for place in seam.places}


def trees() -> Iterator[ast.Module]:
    for file in FILES:
        yield ast.parse(file.read_text())


def for_type_checkers(tree: ast.AST) -> set[ast.AST]:
    """Imports that never run."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {node for block in blocks for node in ast.walk(block)}


def imported(tree: ast.AST) -> dict[str, str]:
    """Name in the module -> place in vLLM."""
    skipped, found = for_type_checkers(tree), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not [alias for alias in node.names if alias.name.split(".")[0] == "vllm"], ast.unparse(node)
        if isinstance(node, ast.ImportFrom) and node not in skipped and (node.module or "").split(".")[0] == "vllm":
            found |= {alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names}
    return found


def test_every_import_is_a_seam():
    places = {place for tree in trees() for place in imported(tree).values()}
    assert len(places) > 50 and places - set(BY_PLACE) == set()


def test_no_seam_refuses_a_start_for_a_name_that_nobody_needs():
    """One that says nothing of the object is there because the plugin imports it; the check itself asks the version."""
    every = [ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")]
    imports = {place for tree in every for place in imported(tree).values()}
    bare = [seam for seam in SEAMS if not (seam.has or seam.takes or seam.mentions or seam.behaves or seam.moved)]
    assert bare and [seam.places for seam in bare if not imports & set(seam.places)] == []


def test_every_keyword_of_a_call_is_a_parameter_of_its_seam():
    unnamed = []
    for tree in trees():
        names = imported(tree)
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names:
                seam = BY_PLACE[names[call.func.id]]
                given = {keyword.arg for keyword in call.keywords if keyword.arg}
                unnamed += [(*seam.places, keyword) for keyword in given - set(seam.takes.split())]
    assert unnamed == []


def test_every_private_name_is_in_a_seam():
    """Attributes and keywords that begin with an underscore, except those that the plugin itself defines."""
    used, own = set(), set()
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                used.add(node.arg)
    known = {name for seam in SEAMS for name in f"{seam.has} {seam.mentions} {seam.takes}".split()}
    # transformers' attention implementation, torch's compiled function (a workaround shows it).
    others = {"_attn_implementation", "_artifacts"}
    private = {name for name in used - own - others if name.startswith("_") and not name.endswith("__")}
    assert private and private - known == set()


def test_every_overridden_method_is_in_a_seam():
    known = {name for seam in SEAMS for name in seam.has.split()}
    modules = [importlib.import_module(f"vllm_yocou.{name}") for name in BUILT_ON_VLLMS]
    overridden = set().union(*map(methods_over_vllms, modules))
    assert {"get_kv_cache_spec", "add_request", "update_state", "convert"} <= overridden
    assert overridden - known == set()


def methods_over_vllms(module) -> set[str]:
    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
    found = set()
    for cls in classes:
        bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] == "vllm"]
        theirs = {name for base in bases for name in vars(base) if not name.startswith("__")}
        found |= theirs & {name for name, value in vars(cls).items() if inspect.isroutine(value)}
    return found


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.places[0])
def test_a_seam_is_there(seam, cuda):
    assert seam.missing() is None


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.places[0])
def test_a_seam_names_a_test_that_exists(seam):
    assert (ROOT / "tests" / seam.test).is_file()


def test_a_moved_seam_is_where_it_is_said_to_be():
    """In versions after `moved` at the first place; before, at a later one, which goes with that version."""
    moved = [seam for seam in SEAMS if len(seam.places) > 1]
    assert moved and [seam for seam in SEAMS if seam.moved] == moved
    for seam in moved:
        last = tuple(map(int, seam.moved.split(".")))
        at_the_first = Seam(seam.places[0], seam.why, seam.test).missing() is None
        assert at_the_first == (tuple(__version_tuple__[:2]) > last)


def test_no_seam_stands_twice():
    places = [place for seam in SEAMS for place in seam.places]
    assert len(places) == len(set(places))
