"""``remote-modules bench``: the scripts of ``benchmarks/`` in a source checkout."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from remote_modules.cli import output
from remote_modules.errors import RemoteModulesError

__all__ = ["bench"]

FOLDER = Path(__file__).parents[2] / "benchmarks"


def bench(
    context: typer.Context,
    scenario: Annotated[
        str | None, typer.Argument(metavar="[SCENARIO]", help="Which one; all are listed when left out.")
    ] = None,
) -> None:
    """Run a benchmark of a source checkout. What follows SCENARIO is passed on to it."""
    scenarios = _find_scenarios(FOLDER)
    if scenario is None:
        output.out.print(output.fields_table({name: _summary(path) for name, path in scenarios.items()}))
        return
    if scenario not in scenarios:
        raise ValueError(f"no benchmark '{scenario}'; there are {', '.join(scenarios)}")
    command = [sys.executable, str(scenarios[scenario]), *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _find_scenarios(folder: Path) -> dict[str, Path]:
    """Scripts by name; those that start with an underscore are helpers.

    Raises:
        RemoteModulesError: there are none.
    """
    scripts = {path.stem: path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_")}
    if not scripts:
        raise RemoteModulesError(f"no benchmarks in {folder}; run this from a source checkout of remote-modules")
    return scripts


def _summary(path: Path) -> str:
    """The first line of the script's docstring."""
    try:
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    except SyntaxError:
        docstring = ""
    return docstring.partition("\n")[0]
