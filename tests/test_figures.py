"""The figures in docs/figures/ show what the code does, and stay readable where Markdown embeds them as images."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from harness.checkout import ROOT

from vllm_yocou.rows.selection import select_rows
from vllm_yocou.serving.packing import Packing

FOLDER = ROOT / "docs" / "figures"
FIGURES = sorted(FOLDER.glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
each_figure = pytest.mark.parametrize("file", FIGURES, ids=lambda file: file.stem)


def words(name: str) -> list[str]:
    """The texts that a figure shows, in the order of the file."""
    drawn = ElementTree.parse(FOLDER / name).iter(f"{SVG}text")
    return ["".join(text.itertext()) for text in drawn]


def test_there_are_figures():
    assert FIGURES


@each_figure
def test_screen_readers_get_a_title_and_a_description(file: Path):
    root = ElementTree.parse(file).getroot()
    named = [root.find(f"{SVG}{part}") for part in ("title", "desc")]
    assert all(part is not None and (part.text or "").strip() for part in named)
    assert root.get("aria-labelledby", "").split() == [part.get("id") for part in named]


@each_figure
def test_an_image_may_load_it(file: Path):
    """A browser runs no script in an image and fetches nothing for it; hosts refuse some files that try."""
    for element in ElementTree.parse(file).iter():
        assert element.tag.removeprefix(SVG) not in {"script", "foreignObject", "image"}
        for key, value in element.attrib.items():
            assert not key.startswith("on"), f"{key} is a script"
            assert not key.endswith(("href", "src")) or value.startswith("#"), f"{value} lies outside"
    source = file.read_text(encoding="utf-8")
    assert "@import" not in source
    assert re.findall(r"url\((?!#)[^)]*\)", source) == []
    assert file.stat().st_size < 10_000


@each_figure
def test_a_phone_shows_its_text_at_ten_pixels_or_more(file: Path):
    root = ElementTree.parse(file).getroot()
    width = float(root.get("viewBox", "").split()[2])
    sizes = [float(size) for size in re.findall(r"font-size\W+([\d.]+)", file.read_text(encoding="utf-8"))]
    assert sizes, "the browser's own font size depends on nothing in the file"
    assert min(sizes) >= width / 36  # 10 of a phone's 360 pixels


def test_all_have_one_style():
    styles = {ElementTree.parse(file).findtext(f"{SVG}style") for file in FIGURES}
    assert len(styles) == 1 and None not in styles


def test_the_pool_is_packed_as_drawn():
    cpu, cuda = (Packing.choose(30, block, window_bytes=1, global_bytes=1, max_global_block=512) for block in (32, 16))
    shown = words("kv-pool.svg")
    assert f"{cpu.layers_per_block} window caches" in shown
    assert f"{cpu.window_block} tokens of each" in shown
    assert f"{cpu.global_block} tokens of it" in shown
    assert f"{cpu.groups + 1} block tables" in shown
    assert f"instead of {cpu.window_caches + 1}, one for each cache" in shown
    cuda_block = f"{cuda.layers_per_block} \N{MULTIPLICATION SIGN} {cuda.window_block} tokens a block"
    assert f"On CUDA: {cuda_block}, {cuda.groups + 1} tables." in shown
    assert cpu.waste == cuda.waste == 0  # "the same bytes"


def test_the_step_selects_the_rows_that_are_drawn():
    scheduled = np.array([1, 6, 5, 5])
    starts = np.concatenate([[0], np.cumsum(scheduled)])
    selected = select_rows(
        starts,
        context_lengths=np.array([40, 6, 5, 5]),
        is_prefilling=np.array([False, True, True, True]),
        wants_prompt=np.array([False, False, False, True]),
        prefill_lengths=np.array([30, 20, 5, 5]),
    )
    assert selected.queries_R.tolist() == [1, 0, 1, 5]
    shown = words("step.svg")
    assert f"One step: N = {starts[-1]} rows of {len(scheduled)} requests" in shown
    assert f"Cross-decoder: M = {len(selected.rows_M)} rows" in shown
    assert f"M = {len(selected.rows_M)} rows of logits" in shown
    assert f"{starts[-1] - len(selected.rows_M)} rows stop here:" in shown


@each_figure
def test_a_page_shows_it(file: Path):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"figures/{file.name})" in page.read_text(encoding="utf-8") for page in pages)
