from __future__ import annotations

import subprocess
import sys

import pytest

from remote_modules.errors import RemoteModulesError

from .program import TIMEOUT_S, invoke, running

COMMANDS = ("tracker", "serve", "status", "plan", "generate", "chat", "demo", "bench")


def test_help_names_every_command() -> None:
    outcome = invoke("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f"│ {command} " in outcome.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(command: str) -> None:
    outcome = invoke(command, "--help")
    assert outcome.code == 0
    assert f"Example: remote-modules {command}" in outcome.out
    assert "env var" not in outcome.out
    assert "<member" not in outcome.out


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from remote_modules.cli.main import app;"
        "CliRunner().invoke(app, ['serve', '--help']);"
        "sys.exit(bool({'torch', 'transformers', 'aiohttp', 'zeroconf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], timeout=TIMEOUT_S, check=False).returncode == 0


def test_version_is_shown() -> None:
    outcome = invoke("--version")
    assert outcome.code == 0
    assert outcome.out.startswith("remote-modules ")


def test_no_command_shows_the_help() -> None:
    assert "Usage: remote-modules" in invoke().out + invoke().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["serve"],
        ["generate", "pydoc-2m"],
        ["serve", "pydoc-2m", "--port", "x"],
        ["demo", "--max-new-tokens", "0"],
    ],
    ids=["unknown command", "no model", "no prompt", "port", "range"],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert invoke(*arguments).code == 2


def test_errors_are_one_line() -> None:
    assert invoke("serve", "pydoc-2m", "--blocks", "4-8").error == (
        "blocks: span must look like START:END, for example 0:4, got '4-8'"
    )


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="START:END"):
        invoke("--debug", "serve", "pydoc-2m", "--blocks", "4-8")
    with pytest.raises(RemoteModulesError):
        invoke("--debug", "serve", "./nowhere", "--tracker", "http://127.0.0.1:9", "--no-mdns")


def test_debug_is_understood_after_the_command_too() -> None:
    with running("serve", "pydoc-2m", "--blocks", "4-8", "--debug") as process:
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert "Traceback" in err
