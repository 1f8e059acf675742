"""What README and docs say can be typed, exists and runs; what the support matrix says, a test shows.

Each check is shown a right and a wrong page as well, so that it is known that it can fail.
"""

import re
from pathlib import Path

import pytest
from harness import commands, pages
from harness.page_shell import PageShell, copy_of_this_tree, starts_server
from harness.pages import PAGES, SHELL, Block, blocks, inline_code, refuses, rows, wrong_test

SUPPORT = pages.ROOT / "docs" / "support.md"
STATUSES = {"yes", "no", "untested", "on a GPU"}
SERVER_TEST = "tests/serving/test_server.py::test_greedy_completion_is_the_references"
# What an inline code that is a command, and not a name of one, begins with.
PROGRAM = re.compile(r"(vllm-yocou|vllm serve|python -m|python \S+\.py|make|pytest) \S")


def names(page: Path) -> str:
    return str(page.relative_to(pages.ROOT))


def mistakes_of_markers(page: Path) -> list[str]:
    return [f"{block.where}: {wrong}" for block in blocks(page) if (wrong := block.wrong_marker())]


def mistakes_of_commands(page: Path) -> list[str]:
    """Of every shell block, of inline code that begins as a command does, and of Python that does not compile."""
    found = []
    for block in blocks(page):
        if block.language in SHELL:
            found += [f"{block.where}: {wrong}" for wrong in mistakes_of_script(block.script)]
        elif block.language in pages.PYTHON:
            try:
                compile(block.text, block.where, "exec")
            except SyntaxError as error:
                found.append(f"{block.where}: {error}")
    for line, text in inline_code(page):
        if PROGRAM.match(text.strip()):
            found += [f"{pages.place(page, line)}: {wrong}" for wrong in mistakes_of_script(text.strip(), whole=False)]
    return found


def mistakes_of_script(script: str, whole: bool = True) -> list[str]:
    if wrong := commands.syntax(script):
        return [wrong]
    found = ((words, commands.mistake(words, whole)) for words in commands.commands(script))
    return [f"`{' '.join(words)}`: {wrong}" for words, wrong in found if wrong]


def mistakes_of_support(page: Path) -> list[str]:
    found = []
    for row in rows(page):
        wrong = [complaint for test in row.tests if (complaint := wrong_test(*test))]
        if row.supported not in STATUSES:
            wrong.append(f"{row.supported!r} is none of {', '.join(sorted(STATUSES))}")
        elif row.supported in ("yes", "no") and not row.tests:
            wrong.append(f"{row.supported}, and no test is named")
        elif row.supported == "on a GPU" and not any("cuda.md" in link for link in row.links):
            wrong.append("on a GPU, and cuda.md is not named")
        elif row.supported == "no" and not wrong and not any(refuses(*test) for test in row.tests):
            wrong.append("no, and none of its tests expects an exception")
        found += [f"{pages.place(page, row.line)}: {complaint}: {row.what}" for complaint in wrong]
    return found


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_command_of_a_page_exists(page):
    mistakes = mistakes_of_markers(page) + mistakes_of_commands(page)
    assert not mistakes, "\n".join(mistakes)


def test_every_row_of_the_support_matrix_is_shown_by_a_test():
    mistakes = mistakes_of_support(SUPPORT)
    assert not mistakes, "\n".join(mistakes)
    assert len(rows(SUPPORT)) > 30  # so that a header that nobody recognises does not pass


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.runs() for block in blocks(page))], ids=names)
def test_every_block_of_a_page_runs(page, starts_vllm, nightly, tmp_path):
    """Letter for letter, unless a comment on the line before says what it needs or which test shows it."""
    with PageShell(copy_of_this_tree(tmp_path / "tree"), tmp_path) as shell:
        failed = [wrong for block in blocks(page) if block.runs() and (wrong := shell.run(block))]
    assert not failed, "\n\n".join(failed)


@pytest.fixture
def page(tmp_path):
    """Writes a page."""

    def write(*lines: str) -> Path:
        (tmp_path / "page.md").write_text("\n".join([*lines, ""]))
        return tmp_path / "page.md"

    return write


def test_blocks_and_markers(page):
    text = page(
        *("# A page", "", "```bash", "make check", "```", ""),
        *("<!-- needs: gpu -->", "```bash", "make gpu", "```", ""),
        *("<details><summary>More</summary>", ""),
        *(f"<!-- shown by: {SERVER_TEST} -->", "```sh", "a \\", "  b", "```", ""),
        *("</details>", "", "```console", "$ make check \\", "    VLLM=0.33", "all is well", "$ ls", "```", ""),
        *("```text", "make nothing", "```"),
    )
    found = blocks(text)
    assert [block.line for block in found] == [3, 8, 15, 22, 29]
    assert [block.marker and block.marker[0] for block in found] == [None, "needs", "shown by", None, None]
    assert [block.runs() for block in found] == [True, False, False, True, False]
    assert found[3].script == "make check \\\n    VLLM=0.33\nls\n"
    assert mistakes_of_markers(text) == []


@pytest.mark.parametrize(
    "marker, complaint",
    [
        ("needs: luck", "needs 'luck': choose from gpu, hours, network"),
        ("shown by: tests/serving/test_server.py::test_nothing", "no test test_nothing in test_server.py"),
        ("shown by: tests/test_absent.py::test_nothing", "no test test_nothing in test_absent.py"),
    ],
)
def test_a_wrong_marker_is_named(marker, complaint, page):
    (mistake,) = mistakes_of_markers(page(f"<!-- {marker} -->", "```bash", "ls", "```"))
    assert mistake.startswith("page.md:2: ") and complaint in mistake


def test_a_marker_away_from_its_block_is_named(page):
    with pytest.raises(ValueError, match=r"no fence follows the marker in line 1\."):
        blocks(page("<!-- needs: gpu -->", "", "```bash", "ls", "```"))


def test_commands_of_a_script():
    script = """# vLLM's server
CUDA_VISIBLE_DEVICES=0 vllm serve m --dtype float32 > log 2>&1 &  # it's quiet
cat > rows.jsonl <<'END'
{"prompt": "it's"}
END
curl http://127.0.0.1:8000/v1 -d \\
  '{"a": "b; c",
    "d": 1}' | tee answer && (make check; ! make test)
"""
    assert commands.commands(script) == [
        ["vllm", "serve", "m", "--dtype", "float32"],
        ["cat"],
        ["curl", "http://127.0.0.1:8000/v1", "-d", '{"a": "b; c",\n\n    "d": 1}'],
        ["tee", "answer"],
        ["make", "check"],
        ["make", "test"],
    ]


@pytest.mark.parametrize(
    "right, wrong, complaint",
    [
        ("vllm-yocou kv MODEL --context 256k", "vllm-yocou kv MODEL --contexts 256k", "No such option"),
        ("vllm-yocou convert SRC DST --dry-run", "vllm-yocou converts SRC DST", "No such command"),
        ("vllm-yocou check --json", "vllm-yocou kv", "Missing argument"),
        ("vllm-yocou info --help", "vllm-yocou info --context many", "'many' is not a positive whole number"),
        ("vllm serve MODEL --enable-lora", "vllm serve MODEL --enable-loras", "unrecognized arguments: --enable-loras"),
        ("vllm serve m --max-model-len 4k", "vllm serve m --max-model-len big", "invalid human_readable_int"),
        ("python examples/inference/offline.py", "python examples/offline.py", "no file examples/offline.py"),
        (
            "python examples/training/distill.py A B C --text T",
            "python examples/training/distill.py A B C --texts T",
            "distill.py has no option --texts",
        ),
        ("python -m benchmarks peers dtypes", "python -m benchmarks peers dtype", "dtype is no table"),
        ("python -m benchmarks render --check", "python -m benchmarks rendered", "No such command 'rendered'"),
        (
            "python -m benchmarks soak --minutes 1",
            "python -m benchmarks soak --hours 1",
            "soak.py has no option --hours",
        ),
        ("python3 -m http.server", "python3 -m nothing", "no module nothing"),
        (".venv/bin/python -m pytest tests/rows -x", "pytest tests/row", "no tests/row"),
        ("make serve VLLM=0.33", "make serves", "No rule to make target 'serves'"),
        ('make test ARGS="tests/rows -x"', "make test ARG=-x", "has no variable ARG"),
        ("for m in a b; do vllm serve $m; done", "for m in a b; vllm serve $m; done", "syntax error"),
        ("echo 'a b'", "echo 'a b", "unexpected EOF"),
    ],
)
def test_a_command_that_does_not_exist_is_named(right, wrong, complaint, page):
    assert mistakes_of_commands(page("text", "", "```bash", right, "```")) == []
    (mistake,) = mistakes_of_commands(page("text", "", "```bash", wrong, "```"))
    assert mistake.startswith("page.md:3: ") and complaint in mistake


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("`make check`", "`make checks`"),
        ("`vllm-yocou kv ...`", "`vllm-yocou kvs ...`"),
        ("    make check     lint, and what is quick", "    make checks"),
    ],
)
def test_inline_commands_are_looked_at_too(right, wrong, page):
    assert mistakes_of_commands(page("A", "", right)) == []
    assert len(mistakes_of_commands(page("A", "", wrong))) == 1


def test_python_that_does_not_compile_is_named(page):
    assert mistakes_of_commands(page("```python", "print(1)", "```")) == []
    (mistake,) = mistakes_of_commands(page("```python", "print(1", "```"))
    assert mistake.startswith("page.md:1: ") and "never closed" in mistake


TESTS = """
import pytest

def test_runs(): assert True
@pytest.mark.slow
@pytest.mark.skipif(not have_amx(), reason="")
def test_runs_somewhere(): pass
def test_refuses():
    with pytest.raises(ValueError): pass
@pytest.mark.skip(reason="")
def test_skipped(): pass
@pytest.mark.skipif(True, reason="")
def test_skipped_by_condition(): pass
@pytest.mark.xfail
def test_fails(): pass
def test_gives_up(): pytest.skip("")
"""


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("| a | yes | [a.py](a.py) `test_runs`, `test_runs_somewhere` |", None),
        ("| a | no | [a.py](a.py) `test_runs`, `test_refuses` |", None),
        ("| a | untested | |", None),
        ("| a | on a GPU | [cuda.md](cuda.md#a) |", None),
        ("| a | maybe | [a.py](a.py) `test_runs` |", "'maybe' is none of"),
        ("| a | yes | |", "yes, and no test is named"),
        ("| a | no | [cuda.md](cuda.md) |", "no, and no test is named"),
        ("| a | no | [a.py](a.py) `test_runs` |", "none of its tests expects an exception"),
        ("| a | on a GPU | |", "cuda.md is not named"),
        ("| a | yes | `test_runs` |", "no link stands before it"),
        ("| a | yes | [a.py](a.py) `test_walks` |", "no test test_walks in a.py"),
        ("| a | yes | [b.py](b.py) `test_runs` |", "no test test_runs in b.py"),
        ("| a | untested | [a.py](a.py) `test_walks` |", "no test test_walks in a.py"),
        ("| a | yes | [a.py](a.py) `test_skipped` |", "is skipped"),
        ("| a | yes | [a.py](a.py) `test_skipped_by_condition` |", "is skipped"),
        ("| a | yes | [a.py](a.py) `test_fails` |", "is skipped, or expected to fail"),
        ("| a | yes | [a.py](a.py) `test_gives_up` |", "is skipped"),
    ],
)
def test_a_row_that_no_test_shows_is_named(row, complaint, page, tmp_path):
    (tmp_path / "a.py").write_text(TESTS)
    table = page("| what | supported | shown by |", "|---|---|---|", row)
    mistakes = mistakes_of_support(table)
    assert len(rows(table)) == 1 and len(mistakes) == (complaint is not None)
    assert all(mistake.startswith("page.md:3: ") and complaint in mistake for mistake in mistakes)


def test_a_module_that_is_skipped_shows_nothing(tmp_path):
    (tmp_path / "marked.py").write_text("pytestmark = [pytest.mark.skip('')]\ndef test_runs(): pass\n")
    (tmp_path / "skipping.py").write_text("pytest.skip('', allow_module_level=True)\ndef test_runs(): pass\n")
    (tmp_path / "other.py").write_text("pytestmark = needs_compiler\ndef test_runs(): pass\n")
    assert "is skipped" in wrong_test(tmp_path / "marked.py", "test_runs")
    assert "is skipped" in wrong_test(tmp_path / "skipping.py", "test_runs")
    assert wrong_test(tmp_path / "other.py", "test_runs") is None


# In the place of vLLM: it answers when it is asked for its health, and says what it was given.
VLLM = """#!/usr/bin/env python3
import http.server, sys
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(" ".join(sys.argv[1:]).encode())
if sys.argv[1] != "serve": sys.exit("not a server")
if "--broken" in sys.argv: sys.exit("no memory")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Server).serve_forever()
"""
MAKEFILE = "serve:\n\t.venv/bin/vllm serve m $(ARGS)\nlist:\n\tls\n"
ASK = "curl --silent --fail http://127.0.0.1:8000/any"


@pytest.fixture
def shell(tmp_path):
    programs = tmp_path / "tree" / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "vllm").write_text(VLLM)
    (programs / "vllm").chmod(0o755)
    (tmp_path / "tree" / "Makefile").write_text(MAKEFILE)
    with PageShell(tmp_path / "tree", tmp_path) as started:
        yield started


def block(*lines: str, language: str = "bash") -> Block:
    return Block(Path("page.md"), 7, language, "\n".join([*lines, ""]), None)


def test_blocks_share_a_folder_and_variables(shell):
    assert shell.run(block("mkdir sub && cd sub", "A='b c'", "touch made")) is None
    assert shell.run(block('[ "$A" = "b c" ]', "[ -f made ]", "[ 8000 = $((4000 + 4000)) ]")) is None
    assert shell.run(block("import os", "assert os.path.exists('made')", language="python")) is None


@pytest.mark.parametrize(
    "failing, limit_s, reason",
    [
        (block("echo first", "ls absent", "echo later"), 60, "ended with 2"),
        (block("false | cat"), 60, "ended with 1"),
        (block("raise SystemExit(3)", language="python"), 60, "ended with 3"),
        (block("sleep 60"), 1, "took more than 1 s"),
    ],
)
def test_a_block_that_fails_says_where_and_what(failing, limit_s, reason, shell):
    wrong = shell.run(failing, limit_s)
    assert wrong.startswith(f"page.md:7: {reason}\n{failing.script}") and "later" not in wrong.partition("-----")[2]


@pytest.mark.parametrize(
    "serve", ["vllm serve m --dtype auto", "make serve  # a comment", 'make serve ARGS="--dtype a"']
)
def test_a_server_stays_for_its_block_and_the_next(serve, shell):
    assert shell.run(block("true && " + serve, f"{ASK} | grep 'serve m.* --port'")) is None
    assert shell.run(block(f"{ASK} > answer")) is None
    assert ("--dtype" in serve) == ("--dtype" in (shell.folder / "tree" / "answer").read_text())
    assert "ended with 7" in shell.run(block(ASK))  # curl's code for a port that nobody listens at


def test_the_next_server_takes_the_place_of_the_first(shell):
    assert shell.run(block("vllm serve first")) is None
    assert shell.run(block("vllm serve second", f"{ASK} | grep second")) is None


def test_one_block_starts_one_server(shell):
    assert "start the next one in a block of its own" in shell.run(block("vllm serve first", "vllm serve second"))


def test_a_server_that_does_not_start_says_why(shell):
    assert "no memory" in shell.run(block("vllm serve m --broken", ASK))


def test_only_servers_run_in_the_background(shell):
    assert "not a server" in shell.run(block("vllm bench"))
    assert shell.run(block("make list")) is None
    assert starts_server(block("a=1 vllm serve m")) and not starts_server(block("vllm bench serve"))


def test_the_copy_is_this_tree_and_installs_nothing(tmp_path):
    tree = copy_of_this_tree(tmp_path / "tree")
    assert (tree / "tests" / "test_pages.py").read_text() == Path(__file__).read_text()
    with (tree / "Makefile").open("a") as makefile:
        makefile.write("\nask: $(SERVING) $(TESTING)\n\t$(BIN)/python -c 'import sys; print(sys.prefix)'\n")
    with PageShell(tree, tmp_path) as shell:
        assert shell.run(block(f'[ "$(make --silent ask)" = "{tree}/.venv" ]')) is None
        assert shell.run(block("python -c 'import vllm_yocou; print(*vllm_yocou.__path__)' > found")) is None
    assert (tree / "found").read_text() == f"{tree}/vllm_yocou\n"
