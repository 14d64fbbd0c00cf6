"""Options that several commands have, and what they say of where peers are found."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from remote_modules.config import default_trackers

__all__ = [
    "CacheDirOption",
    "DtypeOption",
    "JsonOption",
    "MaxNewTokensOption",
    "MdnsOption",
    "ModelArgument",
    "PeersOption",
    "RevisionOption",
    "SeedOption",
    "Sources",
    "TemperatureOption",
    "TokenOption",
    "TopPOption",
    "TrackersOption",
    "WaitOption",
]

SWARM = "Swarm"
TEXT = "Text"
HUB = "Hugging Face Hub"

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, local checkpoint folder, or 'pydoc-2m', the built-in small model."),
]
TrackersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        metavar="URL",
        help="Tracker; may be given several times. [dim]Default: $REMOTE_MODULES_TRACKERS, comma separated.[/dim]",
        rich_help_panel=SWARM,
    ),
]
PeersOption = Annotated[
    list[str] | None,
    typer.Option("--peer", metavar="HOST:PORT", help="Known peer; may be given several times.", rich_help_panel=SWARM),
]
MdnsOption = Annotated[
    bool, typer.Option("--mdns/--no-mdns", help="Also use the local network.", rich_help_panel=SWARM)
]
WaitOption = Annotated[
    float,
    typer.Option(
        "--wait-s", min=0.0, metavar="SECONDS", help="How long to wait for missing peers.", rich_help_panel=SWARM
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for programs.")]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest answer.", rich_help_panel=TEXT)
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        min=0.0,
        metavar="T",
        help="Sample; higher is wilder. [dim]Default: greedy.[/dim]",
        rich_help_panel=TEXT,
    ),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        metavar="P",
        help="Sample from the likeliest tokens of this mass.",
        rich_help_panel=TEXT,
    ),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Of the sampling, to repeat it.", rich_help_panel=TEXT)
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", metavar="auto|float32|bfloat16|float16", help="'auto' is the checkpoint's.")
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", metavar="NAME", help="Branch, tag or commit.", rich_help_panel=HUB)
]
CacheDirOption = Annotated[
    Path | None, typer.Option("--cache-dir", metavar="PATH", help="Where downloads are kept.", rich_help_panel=HUB)
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token", metavar="TOKEN", help="For gated models. [dim]Default: $HF_TOKEN.[/dim]", rich_help_panel=HUB
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where to look for peers."""

    trackers: tuple[str, ...]
    peers: tuple[str, ...]
    mdns: bool

    @classmethod
    def of(cls, trackers: list[str] | None, peers: list[str] | None, mdns: bool) -> Sources:
        return cls(trackers=tuple(trackers or default_trackers()), peers=tuple(peers or ()), mdns=mdns)

    @property
    def is_empty(self) -> bool:
        return not (self.trackers or self.peers or self.mdns)

    def arguments(self) -> str:
        """The options that name these sources on a command line; empty for the local network alone."""
        words = [word for url in self.trackers for word in ("--tracker", url)]
        words += [word for address in self.peers for word in ("--peer", address)]
        return shlex.join(words)

    def __str__(self) -> str:
        names = [*self.trackers, *self.peers, *(["the local network"] if self.mdns else [])]
        return ", ".join(names)
