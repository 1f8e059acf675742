"""A Markdown page as tests read it: its blocks of code, its inline code, and tables whose rows name tests."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from harness.checkout import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "RELEASING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("examples", "benchmarks")),
]
SHELL = {"bash", "sh", "console"}
PYTHON = {"python", "py"}
MARKER = re.compile(r"\s*<!--\s*(needs|shown by):\s*(.*?)\s*-->\s*")
NEEDS = {"gpu", "network", "hours", "several machines"}


@dataclass(frozen=True)
class Block:
    """A fenced block. `marker` is what the comment on the line before it says: ("needs", "gpu") and the like."""

    page: Path
    line: int
    language: str
    text: str
    marker: tuple[str, str] | None

    @property
    def where(self) -> str:
        return place(self.page, self.line)

    @property
    def script(self) -> str:
        """What a reader types: of a console the lines behind its prompts, which a backslash continues."""
        if self.language != "console":
            return self.text
        typed, goes_on = [], False
        for line in self.text.splitlines():
            if goes_on or line.startswith("$ "):
                typed.append(line if goes_on else line[2:])
                goes_on = line.endswith("\\")
        return "\n".join(typed) + "\n"

    def runs(self) -> bool:
        """Whether a test runs it as it stands."""
        return self.language in SHELL | PYTHON and self.marker is None

    def wrong_marker(self) -> str | None:
        if self.marker is None:
            return None
        kind, value = self.marker
        if kind == "needs":
            return None if value in NEEDS else f"it needs {value!r}: choose from {', '.join(sorted(NEEDS))}"
        path, _, name = value.partition("::")
        return wrong_test(ROOT / path, name)


@dataclass(frozen=True)
class Row:
    """A row of a table whose columns are what, supported, shown by. `tests` are files and functions, in order."""

    line: int
    what: str
    supported: str
    links: list[str]
    tests: list[tuple[Path | None, str]]


def place(page: Path, line: int) -> str:
    return f"{page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name}:{line}"


def parsed(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(page: Path) -> list[Block]:
    """Raises ValueError for a comment that speaks of needs or tests and does not stand right before a fence."""
    lines, found = page.read_text().splitlines(), []
    for token in parsed(page):
        if token.type == "fence":
            start = token.map[0]
            marker = MARKER.fullmatch(lines[start - 1]) if start else None
            language = token.info.split()[0] if token.info.split() else ""
            found.append(Block(page, start + 1, language, token.content, marker and marker.groups()))
    taken = {block.line - 1 for block in found if block.marker}
    lost = [str(number) for number, line in enumerate(lines, 1) if MARKER.fullmatch(line) and number not in taken]
    if lost:
        raise ValueError(f"{page.name}: no fence follows the marker in line {', '.join(lost)}.")
    return found


def inline_code(page: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every code span, and of every line of an indented block, without what three spaces set apart."""
    for token in parsed(page):
        if token.type == "inline":
            yield from ((token.map[0] + 1, span.content) for span in token.children if span.type == "code_inline")
        if token.type == "code_block":
            lines = enumerate(token.content.splitlines(), token.map[0] + 1)
            yield from ((number, re.split(r"(?<=\S) {3,}", line)[0]) for number, line in lines)


def rows(page: Path) -> list[Row]:
    """Of all tables whose header is what, supported, shown by."""
    found, header = [], None
    cells: list[Token] = []
    for token in parsed(page):
        if token.type == "table_open":
            header = None
        elif token.type == "tr_open":
            cells = []
        elif token.type == "inline":
            cells.append(token)
        elif token.type == "tr_close" and header is None:
            header = [cell.content for cell in cells]
        elif token.type == "tr_close" and header == ["what", "supported", "shown by"]:
            what, supported, shown = cells
            found.append(Row(what.map[0] + 1, what.content, supported.content, *links_and_tests(page, shown)))
    return found


def links_and_tests(page: Path, cell: Token) -> tuple[list[str], list[tuple[Path | None, str]]]:
    """Of `[file](path) `test_a`, `test_b``; a function belongs to the link before it."""
    links, tests = [], []
    for child in cell.children:
        if child.type == "link_open":
            links.append(str(child.attrs["href"]))
        elif child.type == "code_inline" and child.content.startswith("test_"):
            tests.append(((page.parent / links[-1]).resolve() if links else None, child.content))
    return links, tests


@cache
def module_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_function(path: Path | None, name: str) -> ast.FunctionDef | None:
    if path is None or not path.is_file() or path.suffix != ".py":
        return None
    functions = (node for node in module_of(path).body if isinstance(node, ast.FunctionDef))
    return next((node for node in functions if node.name == name), None)


test_function.__test__ = False


def wrong_test(path: Path | None, name: str) -> str | None:
    """What is wrong with a test that a page names: it is not there, or it never runs."""
    function = test_function(path, name)
    if function is None:
        return f"there is no test {name} in {path.name if path else 'any file, since no link stands before it'}"
    marks = [
        node.value
        for node in module_of(path).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    calls = [node.value for node in (*module_of(path).body, *function.body) if isinstance(node, ast.Expr)]
    if any(map(skips_always, [*marks, *calls, *function.decorator_list])):
        return f"{path.name}::{name} is skipped, or expected to fail, wherever it runs"
    return None


def skips_always(node: ast.expr) -> bool:
    """Of a decorator, a value of `pytestmark` or a call that is a statement of its own."""
    if isinstance(node, ast.List | ast.Tuple):
        return any(map(skips_always, node.elts))
    called, condition = (node.func, node.args) if isinstance(node, ast.Call) else (node, [])
    kind = ast.unparse(called)
    if kind in ("pytest.mark.skipif", "pytest.mark.xfail") and condition:
        return ast.unparse(condition[0]) in ("True", "1")
    return kind in ("pytest.mark.skip", "pytest.skip", "pytest.mark.xfail", "pytest.xfail")


def refuses(path: Path, name: str) -> bool:
    """Whether a test expects an exception: it says `raises`, or calls a function of its module that does."""
    names = {node.id for node in ast.walk(test_function(path, name)) if isinstance(node, ast.Name)}
    functions = [node for node in module_of(path).body if isinstance(node, ast.FunctionDef)]
    said = [ast.unparse(function) for function in functions if function.name in {name, *names}]
    return any("raises(" in text for text in said)
