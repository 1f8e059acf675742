"""Measure tables, and render the pages from what was measured."""

import subprocess
import sys
from collections.abc import Callable
from itertools import takewhile
from typing import Annotated

import typer

from benchmarks import console, render
from benchmarks.results import ROOT
from benchmarks.tables.catalogue import GROUPS, TABLES
from benchmarks.tables.table import Table

HELP = """Measure tables, each in a process of its own, and render the pages from what was measured.

A table goes to standard output and, with the value of every run, to benchmarks/results/MACHINE/TABLE.json. Times are of
two cores, on which nothing else may run where time is measured.

- `python -m benchmarks`: every table that needs no arguments and no GPU

- `python -m benchmarks prefill peers`: some of them

- `python -m benchmarks t_sweep --corpus kjv`: one with arguments, which `t_sweep --help` lists

- `python -m benchmarks --paper`: those of the paper's 1.3B shape, on a GPU

- `python -m benchmarks render`: the tables and pictures of every page, from the results
"""
OF_PAPER = ["peers_paper"]
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(add_completion=False, help=HELP, rich_markup_mode="markdown")


def measure(words: list[str]) -> None:
    """Measure the tables that `words` names; after a single name come the arguments of that table."""
    names = list(takewhile(TABLES.__contains__, words))
    arguments = words[len(names) :]
    if arguments and not (len(names) == 1 and TABLES[names[0]].has_options):
        known = ", ".join(TABLES)
        sys.exit(f"{arguments[0]}: not a table: choose from {known}, one at a time where it has arguments.")
    if "--help" in arguments:
        sys.exit(subprocess.run([sys.executable, "-m", *TABLES[names[0]].command, *arguments]).returncode)
    failed = []
    for name in names:
        table = TABLES[name]
        console.progress(f"{name}: {table.about} ({table.takes})")
        if not console.run(name, [*table.command, *arguments]):
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}.")


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    paper: Annotated[bool, typer.Option("--paper", help="The tables of the paper's 1.3B shape, on a GPU.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        measure(OF_PAPER if paper else [name for name, table in TABLES.items() if table.by_default])


def help_of(table: Table) -> str:
    return f"{table.about}. Needs: {table.needs}. Time: {table.takes}{' for each type' if table.each_dtype else ''}."


def command_of(name: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        measure([name, *context.args])

    return run


for group, tables in GROUPS.items():
    for table in tables:
        text = help_of(table)
        register = app.command(table.name, help=text, context_settings=PASSED_ON, rich_help_panel=group)
        register(command_of(table.name))


@app.command("render", rich_help_panel="Results")
def write(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail where something differs.")] = False,
) -> None:
    """Rewrite the blocks between result markers in the pages, and the pictures. Needs no model; takes seconds."""
    try:
        wrong = render.mistakes() if check else []
        written = [] if check else render.write()
    except LookupError as error:
        sys.exit(str(error))
    if wrong:
        sys.exit("\n".join([*wrong, "`python -m benchmarks render` writes what benchmarks/results say."]))
    for path in written:
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    app()
