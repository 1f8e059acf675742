"""What stands between the markers of a page, and every picture, is made from benchmarks/results and the code alone.

<!-- results: prefill -->
one section for each machine that has a result
<!-- end -->

<!-- seams -->
a row for everything of vLLM's that the plugin relies on
<!-- end -->
"""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER, ROOT, Result
from benchmarks.tables.catalogue import TABLES
from vllm_yocou.seams.table import SEAMS as OF_SERVING
from vllm_yocou.seams.table import SELF_CHECK

PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
START = re.compile(r"^<!-- results: (.*) -->$", re.MULTILINE)
SEAMS = re.compile(r"^(<!-- seams -->\n).*?^(<!-- end -->)$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^(<!-- results: (.*?) -->\n).*?^(<!-- end -->)$", re.MULTILINE | re.DOTALL)
SOURCE = "Source"  # of a picture: the digest of the result that it shows
SIZE_INCHES, DOTS_PER_INCH = (13, 4.6), 110


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table, without the columns that are empty in every row."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{len(row)} cells under {len(header)} headings: {row}")
    kept = [i for i in range(len(header)) if any(row[i] != "" for row in rows)]
    lines = [[header[i] for i in kept], *([row[i] for i in kept] for row in rows)]
    head, *body = [f"| {' | '.join(str(cell) for cell in line)} |" for line in lines]
    return "\n".join([head, f"|{'---|' * len(kept)}", *body])


def section(result: Result) -> str:
    """What was measured where, and the table."""
    table = TABLES[result.table]
    versions = result.environment.get("versions", {})
    parts = [f"{package} {versions[package]}" for package in ("vllm", "torch") if versions.get(package)]
    parts += [result.date, f"commit {result.commit}"]
    where = f"**{result.machine}** ({', '.join(parts)})"
    note = f"{where}: {table.note(result)} {result.remark}".strip()
    return f"{note}\n\n{markdown(*table.whole(result))}"


def block(name: str, page: Path) -> str:
    """A section for each machine, with its picture; links start from the folder of `page`."""
    sections = []
    for result in Result.all_of(name):
        sections.append(section(result))
        if TABLES[name].draw is not None:
            link = Path(os.path.relpath(picture(result), page.parent)).as_posix()
            sections.append(f"![{TABLES[name].picture}, {result.machine}]({link})")
    return "\n\n".join(sections)


def seams(page: Path) -> str:
    """A table of vLLM's names, why the plugin needs them, and the test of each."""
    tests = Path(os.path.relpath(ROOT / "tests", page.parent)).as_posix()
    rows = []
    for seam in OF_SERVING + SELF_CHECK:
        names = [f"`{place.replace(':', '.').removeprefix('vllm.')}`" for place in seam.places]
        rows.append([" or ".join(names), seam.why, f"[{seam.test}]({tests}/{seam.test})"])
    return markdown(["in `vllm`", "why", "test"], rows)


def rendered(page: Path) -> str:
    """The page's text with every block as the results have it."""

    def fill(found: re.Match[str]) -> str:
        name = found[2]
        if name not in TABLES:
            raise LookupError(f"{page.name} has a block of results '{name}', which is not a table.")
        return f"{found[1]}\n{block(name, page)}\n\n{found[3]}"

    text = page.read_text()
    if START.findall(text) != names(text):
        raise LookupError(f"{page.name} has a block of results without a line '<!-- end -->'.")
    return SEAMS.sub(lambda found: f"{found[1]}\n{seams(page)}\n\n{found[2]}", BLOCK.sub(fill, text))


def names(text: str) -> list[str]:
    """Tables whose results a page shows."""
    return [name for _, name, _ in BLOCK.findall(text)]


def results() -> list[Result]:
    return [Result.load(path) for path in sorted(FOLDER.glob("*/*.json"))]


def picture(result: Result) -> Path:
    return result.path.with_suffix(".png")


def digest(result: Result) -> str:
    return hashlib.sha256(result.path.read_bytes()).hexdigest()


def draw(result: Result) -> None:
    """The picture of a result that has one; it carries the result's digest."""
    from matplotlib.figure import Figure  # takes a second, which only pictures need

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    show: Callable[[Result, Any], None] | None = TABLES[result.table].draw
    assert show is not None
    show(TABLES[result.table].parts(result)[-1], figure)
    figure.savefig(picture(result), dpi=DOTS_PER_INCH, metadata={SOURCE: digest(result)})


def is_drawn(result: Result) -> bool:
    """Whether the picture exists and shows this result."""
    path = picture(result)
    return path.exists() and f"{SOURCE}\0{digest(result)}".encode() in path.read_bytes()


def pictured() -> list[Result]:
    return [result for result in results() if TABLES[result.table].draw is not None]


def mistakes() -> list[str]:
    """A sentence for each page and picture that does not follow from the results, and for each result nobody sees."""
    found = []
    shown: set[str] = set()
    for page in PAGES:
        text = page.read_text()
        shown.update(names(text))
        if rendered(page) != text:
            found.append(f"{page.relative_to(ROOT)} differs from what it is rendered from.")
    found += [f"{picture(result).name} of {result.machine} shows another result." for result in stale_pictures()]
    hidden = dict.fromkeys(result.table for result in results() if result.table not in shown)
    return found + [f"no page has a block for the results of {name}." for name in hidden]


def stale_pictures() -> list[Result]:
    return [result for result in pictured() if not is_drawn(result)]


def write() -> list[Path]:
    """Rewrite the blocks and draw the pictures that are out of date; return what was written."""
    written = []
    for page in PAGES:
        text = rendered(page)
        if text != page.read_text():
            page.write_text(text)
            written.append(page)
    for result in stale_pictures():
        draw(result)
        written.append(picture(result))
    return written
