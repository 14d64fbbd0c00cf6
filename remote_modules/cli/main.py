"""The command ``remote-modules``: its global options, its commands, and what becomes of their errors.

torch and transformers take seconds to import, so only the body of a command may do it; ``--help`` needs neither.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from remote_modules.cli import output
from remote_modules.cli.bench import bench
from remote_modules.cli.chat import chat
from remote_modules.cli.demo import demo
from remote_modules.cli.generate import generate
from remote_modules.cli.plan import plan
from remote_modules.cli.serve import serve
from remote_modules.cli.status import status
from remote_modules.cli.tracker import tracker
from remote_modules.errors import RemoteModulesError

__all__ = ["app", "main"]

PROGRAM = "remote-modules"
INTERRUPTED = 130


class _Group(TyperGroup):
    """Turns expected errors of a command into one line and an exit code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _hide_environment(self.params)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            output.end_line()
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except (RemoteModulesError, ValueError, OSError) as exc:
            if ctx.params.get("debug"):
                raise
            output.end_line()
            output.print_error(exc)
            raise typer.Exit(1) from exc


class _Command(TyperCommand):
    """Names no environment variables in its help: they follow one rule, which the program's help gives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _hide_environment(self.params)


def _hide_environment(parameters: list[Any]) -> None:
    for parameter in parameters:
        if isinstance(parameter, TyperOption):
            parameter.show_envvar = False


app = typer.Typer(
    name=PROGRAM,
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"auto_envvar_prefix": "REMOTE_MODULES", "help_option_names": ["-h", "--help"]},
    epilog="Start with [bold]remote-modules demo[/bold]. Options can be set by environment too: "
    "REMOTE_MODULES_TRACKERS holds tracker URLs, REMOTE_MODULES_SERVE_PORT the --port of serve, and so on.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version(PROGRAM)
        except PackageNotFoundError:  # run from a source tree
            number = "0 (source tree)"
        typer.echo(f"{PROGRAM} {number}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_version,
            is_eager=True,
            allow_from_autoenv=False,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    """Run and fine-tune language models too big for one machine, by pooling peers."""
    output.configure_logging(is_debug=debug)


for _command, _example in (
    (tracker, "remote-modules tracker --port 8000"),
    (serve, "remote-modules serve Qwen/Qwen3-8B --tracker http://tracker.example:8000 --host 0.0.0.0"),
    (status, "remote-modules status pydoc-2m --tracker http://127.0.0.1:8000"),
    (plan, "remote-modules plan meta-llama/Llama-3.3-70B-Instruct --peers peers.toml --quantization nf4"),
    (generate, 'remote-modules generate pydoc-2m --prompt "The function returns a" --tracker http://127.0.0.1:8000'),
    (chat, "remote-modules chat Qwen/Qwen3-8B --tracker http://tracker.example:8000"),
    (demo, "remote-modules demo --max-new-tokens 60"),
    (bench, "remote-modules bench decode"),
):
    app.command(
        cls=_Command,
        epilog=f"Example: [bold]{_example}[/bold]",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True} if _command is bench else None,
    )(_command)


def main() -> None:
    """Run the command line of this process; never returns."""
    arguments = sys.argv[1:]
    if "--debug" in arguments:  # wherever it stands: people add it at the end of what has just failed
        arguments = ["--debug", *(argument for argument in arguments if argument != "--debug")]
    else:
        warnings.simplefilter("ignore")
    app(arguments, prog_name=PROGRAM)
