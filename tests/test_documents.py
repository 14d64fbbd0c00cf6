"""What the documents say can be done, can be done: links resolve, code runs, commands parse, examples are real."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer.main
from transformers.utils import logging as transformers_logging

from remote_modules.cli.main import app
from remote_modules.testing import LocalSwarm

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README = ROOT / "README.md"
SOURCES = 'trackers=["http://127.0.0.1:8000"]'  # where the README's tracker listens

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\[]*\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


class Block(NamedTuple):
    """One fenced block of a document."""

    document: Path
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.document.name}-{self.number}"


def blocks(language: str) -> list[Block]:
    return [
        Block(document, number, text)
        for document in DOCUMENTS
        for number, (name, text) in enumerate(FENCE.findall(document.read_text("utf-8")), start=1)
        if name == language
    ]


def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text("utf-8"))


def anchors(document: Path) -> set[str]:
    """As the usual renderers make them: lower case, no punctuation, spaces to hyphens."""
    headings = HEADING.findall(prose(document))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_resolve(document: Path) -> None:
    broken = []
    for link in LINK.findall(prose(document)):
        name, _, anchor = link.partition("#")
        if name.startswith(("https://", "http://")):
            continue
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_readme_leads_to_every_document() -> None:
    linked = {(README.parent / link).resolve() for link in LINK.findall(prose(README))}
    assert [path.name for path in DOCUMENTS if path.resolve() not in linked and path != README] == []


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_parses(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_readme_python_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks share one namespace, as for a reader who types them one after the other."""
    transformers_logging.disable_progress_bar()  # its monitor thread would outlive the test
    torch.manual_seed(0)
    namespace: dict[str, object] = {}
    with LocalSwarm("pydoc-2m", spans=["0:4", "4:8"]) as swarm:
        for block in blocks("python"):
            if block.document == README:
                text = block.text.replace(SOURCES, f"trackers={swarm.trackers}, mdns=False")
                exec(compile(text, str(block), "exec"), namespace)
    output = capsys.readouterr().out
    assert "The function returns a list of the arguments" in output
    assert re.search(r"^steps=20 failovers=0 replayed_tokens=0 route 0:4 \w{6} => 4:8 \w{6}$", output, re.MULTILINE)
    losses = [float(loss) for loss in re.findall(r"^\d (\d+\.\d+)$", output, re.MULTILINE)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_python_of_the_training_page_runs() -> None:
    transformers_logging.disable_progress_bar()
    namespace: dict[str, Any] = {}
    with LocalSwarm("pydoc-2m", spans=["0:4", "4:8"]) as swarm:
        for block in blocks("python"):
            if block.document.name == "trainable.md":
                text = block.text.replace(SOURCES, f"trackers={swarm.trackers}, mdns=False")
                exec(compile(text, str(block), "exec"), namespace)
    assert namespace["tokens"].shape == (1, 9)
    assert all(prompt.abs().max() > 0 for prompt in namespace["prompts"].parameters())
    assert all(parameter.grad is not None for parameter in namespace["adapter"].parameters())


COMMANDS = [
    (f"{block} {words[0]} {number}", words)
    for block in blocks("bash")
    for number, command in enumerate(re.split(r"\n|&&", block.text), start=1)
    if (words := shlex.split(command, comments=True))
]


@pytest.mark.parametrize("words", [words for _, words in COMMANDS], ids=[name for name, _ in COMMANDS])
def test_command_exists(words: list[str]) -> None:
    """Nothing runs, but the command line's own parser must accept our commands; targets and scripts must be there."""
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert arguments[0] in targets
    elif program == "remote-modules":
        group = typer.main.get_command(app)
        name, *options = arguments
        command = group.commands[name]  # type: ignore[attr-defined]  # a group of commands
        command.make_context(name, list(options))
        assert name != "bench" or (ROOT / "benchmarks" / f"{options[0]}.py").exists()
    elif program.endswith("python"):
        paths = [word for word in arguments if word.endswith(".py")]
        assert paths
        assert all((ROOT / path).exists() for path in paths)
    else:
        assert program in ("pip", "git", "cd")
