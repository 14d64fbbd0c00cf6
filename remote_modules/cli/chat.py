"""``remote-modules chat``."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from remote_modules.cli import output
from remote_modules.cli.options import (
    CacheDirOption,
    DtypeOption,
    MaxNewTokensOption,
    MdnsOption,
    ModelArgument,
    PeersOption,
    RevisionOption,
    SeedOption,
    Sources,
    TemperatureOption,
    TokenOption,
    TopPOption,
    TrackersOption,
    WaitOption,
)

if TYPE_CHECKING:
    from remote_modules.cli.conversation import Conversation
    from remote_modules.cli.text import Sampling, Source

__all__ = ["chat"]

PRIVACY = "Peers that run the layers can reconstruct most of what you type and what the model answers."
QUIT = "/quit"


def chat(
    model: ModelArgument,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    trackers: TrackersOption = None,
    peers: PeersOption = None,
    mdns: MdnsOption = True,
    wait_s: WaitOption = 5.0,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    cache_dir: CacheDirOption = None,
    token: TokenOption = None,
) -> None:
    """Talk with a model, by the peers of a swarm. /quit or Ctrl-D ends it, Ctrl-C stops an answer."""
    output.quiet_transformers()
    from remote_modules.cli.text import Sampling, Source

    source = Source.with_hub(
        model=model,
        sources=Sources.of(trackers, peers, mdns),
        dtype=dtype,
        wait_s=wait_s,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
    )
    _chat(source, Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed))


def _chat(source: Source, sampling: Sampling) -> None:
    from remote_modules.cli.conversation import Conversation
    from remote_modules.cli.text import TextModel

    with TextModel.open(source) as text:
        conversation = Conversation(text)
        output.err.print(PRIVACY, style="yellow")
        kind = "" if conversation.has_template else " It has no chat template, so it goes on from what you type."
        output.err.print(
            f"Talking with {source.model}.{kind} {QUIT} or Ctrl-D ends, Ctrl-C stops an answer.",
            style="dim",
            soft_wrap=True,
        )
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() line editing and history
        while (line := _read_line()) is not None:
            if line:
                _answer(conversation, line, sampling)


def _read_line() -> str | None:
    """What the user typed; None at the end."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            output.err.print()
        return None
    return None if line == QUIT else line


def _answer(conversation: Conversation, line: str, sampling: Sampling) -> None:
    from remote_modules.cli.text import StopWatch

    watch = StopWatch()
    try:
        conversation.ask(line, sampling, write=output.stream, watch=watch)
    except KeyboardInterrupt:
        output.end_line()
        output.err.print("(stopped)", style="dim")
        return
    output.end_line()
    stats = conversation.text.stats()
    route = " => ".join(output.describe_route(stats.route))
    output.err.print(f"{watch.tokens_per_s:.1f} tokens/s over {route}", style="dim")
