"""Whether a command of a page exists. Its own parser, file, target or table says so; the command is not run."""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
from argparse import ArgumentParser
from functools import cache
from itertools import takewhile
from pathlib import Path

import typer

from harness.checkout import ROOT

SEPARATORS = set("();|&\n")
# What may stand before a program's name.
BEFORE = {"do", "then", "else", "!", "time", "nice", "sudo", "exec", "env"}
HERE_DOCUMENT = re.compile(r"<<-?\s*(['\"]?)(\w+)\1(.*\n)(?:.*\n)*?\s*\2\b")
REDIRECTION = re.compile(r"(?<=\s)\d?(?:>>?|<)&?\s*[^\s<>]+")


def syntax(script: str) -> str | None:
    """What bash says about a script that it does not understand."""
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


def commands(script: str) -> list[list[str]]:
    """The words of every simple command, without what stands before its program; ValueError for an open quote."""
    plain = REDIRECTION.sub("", HERE_DOCUMENT.sub(r"\3", script.replace("\\\n", " ")))
    # A comment takes the end of its line along, so every line has two.
    lexer = shlex.shlex(plain.replace("\n", "\n\n"), posix=True, punctuation_chars="".join(SEPARATORS))
    lexer.whitespace, lexer.whitespace_split = " \t", True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= SEPARATORS:
            found.append([])
        elif found[-1] or not (word in BEFORE or re.match(r"\w+=", word)):
            found[-1].append(word)
    return [words for words in found if words]


def mistake(words: list[str], whole: bool = True) -> str | None:
    """What is wrong with a command, or None; programs of others are right. `whole`: it lacks nothing that it needs."""
    program, *arguments = (word for word in words if word != "...")
    name = re.sub(r"^python[\d.]*$", "python", Path(program).name)
    known = {"vllm-yocou": of_plugin, "vllm": of_vllm, "python": of_python, "make": of_make, "pytest": of_pytest}
    return known[name](arguments, whole) if name in known else None


def of_plugin(arguments: list[str], whole: bool) -> str | None:
    from vllm_yocou.cli.command_line import app

    return of_typer(app, arguments, whole)


def of_typer(app: typer.Typer, arguments: list[str], whole: bool) -> str | None:
    group = typer.main.get_command(app)
    for command in (group, *group.commands.values()):
        command.callback = None  # parse, and do nothing
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            group(arguments or ["--help"], standalone_mode=False)
    except typer.TyperException as error:
        missing = type(error).__name__ == "MissingParameter"
        return None if missing and not whole else error.format_message()
    return None


@cache
def vllms_parser() -> ArgumentParser:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    ServeSubcommand().subparser_init(parser.add_subparsers(required=True))
    return parser


def of_vllm(arguments: list[str], whole: bool) -> str | None:
    if arguments[:1] != ["serve"]:
        return None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            vllms_parser().parse_args(arguments)
    except SystemExit as ended:
        return said.getvalue().splitlines()[-1] if ended.code else None
    except ValueError as error:
        return str(error)
    return None


def of_python(arguments: list[str], whole: bool) -> str | None:
    if arguments[:1] == ["-m"]:
        module, *rest = arguments[1:]
        if module == "benchmarks":
            return of_benchmarks(rest, whole)
        if module == "pytest":
            return of_pytest(rest, whole)
        return None if importlib.util.find_spec(module) else f"there is no module {module}"
    if not arguments or not arguments[0].endswith(".py"):
        return None
    script = ROOT / arguments[0]
    return unknown_options(script, arguments[1:]) if script.is_file() else f"there is no file {arguments[0]}"


def unknown_options(script: Path, arguments: list[str]) -> str | None:
    """Options that the text of a script does not name. One that passes on what it does not know may get any."""
    text = script.read_text()
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    unknown = [option for option in options if f'"{option}"' not in text and option != "--help"]
    if not unknown or "parse_known_args" in text:
        return None
    return f"{script.name} has no option {', '.join(unknown)}"


def of_benchmarks(arguments: list[str], whole: bool) -> str | None:
    from benchmarks.__main__ import app
    from benchmarks.tables.catalogue import TABLES

    names = list(takewhile(TABLES.__contains__, arguments))
    rest = arguments[len(names) :]
    if not names or not rest:
        return of_typer(app, arguments, whole)
    if len(names) > 1 or not TABLES[names[0]].has_options:
        return f"{rest[0]} is no table, and no option of {names[-1]}"
    return unknown_options(ROOT / "benchmarks" / f"{TABLES[names[0]].module or names[0]}.py", rest)


def of_make(arguments: list[str], whole: bool) -> str | None:
    text = (ROOT / "Makefile").read_text()
    for word in arguments:
        variable, equals, _ = word.partition("=")
        if equals and not re.search(rf"^{variable} *[:?]?=|\$\({variable}\)", text, re.MULTILINE):
            return f"the Makefile has no variable {variable}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else None


def of_pytest(arguments: list[str], whole: bool) -> str | None:
    files = [word.partition("::")[0] for word in arguments if "/" in word and not word.startswith("-")]
    absent = [file for file in files if not (ROOT / file).exists()]
    return f"there is no {', '.join(absent)}" if absent else None
