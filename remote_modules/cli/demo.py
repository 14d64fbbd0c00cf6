"""``remote-modules demo``."""

from __future__ import annotations

import importlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from remote_modules.cli import output
from remote_modules.cli.options import JsonOption
from remote_modules.peers import short_id

if TYPE_CHECKING:
    from remote_modules.cli.scenario import Generation, Training
    from remote_modules.testing import LocalSwarm

__all__ = ["demo"]

SPANS = ("0:3", "3:6", "6:8", "3:6")  # 3:6 twice: one of the two is killed
INDENT = (0, 0, 0, 3)


def demo(
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=3, metavar="N", help="Length of the text.")
    ] = 40,
    train_steps: Annotated[int, typer.Option("--train-steps", min=1, metavar="N", help="Steps of fine-tuning.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Show a whole swarm on this machine in half a minute; needs no network.

    Starts a tracker and four peers, generates, kills a peer in mid-sentence and goes on, fine-tunes a soft prompt, and
    checks all of it against the same model run in this process. Exit code 0 means that everything agreed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    client_log = logging.getLogger("remote_modules.client")
    if client_log.getEffectiveLevel() > logging.DEBUG:
        client_log.setLevel(logging.ERROR)  # the failover is the show, and no surprise
    began_s = time.monotonic()
    generation, training = _run(max_new_tokens, train_steps, is_silent=as_json)
    seconds = time.monotonic() - began_s
    is_good = generation.is_identical and training.is_close
    if as_json:
        output.print_json(_describe(generation, training, seconds))
    else:
        _print_end(is_good, seconds)
    if not is_good:
        raise typer.Exit(1)


def _run(max_new_tokens: int, train_steps: int, *, is_silent: bool) -> tuple[Generation, Training]:
    output.out.quiet = is_silent
    try:
        began_s = time.monotonic()
        threading.Thread(target=importlib.import_module, args=["remote_modules.cli.scenario"], daemon=True).start()
        with _working(f"starting a tracker and {len(SPANS)} peers"):
            swarm = _new_swarm()
            swarm.start()
        try:
            _print_swarm(swarm, time.monotonic() - began_s)
            from remote_modules.cli import scenario

            output.quiet_transformers()
            with scenario.open_client(swarm) as client:
                with _working("generating, here and there"):
                    generation = scenario.compare_generation(swarm, client, max_new_tokens=max_new_tokens)
                _print_generation(generation, scenario.PROMPT)
                with _working("fine-tuning, here and there"):
                    training = scenario.compare_training(client, num_steps=train_steps)
                _print_training(training, scenario.NUM_PROMPT_TOKENS)
        finally:
            swarm.stop()
    finally:
        output.out.quiet = False
    return generation, training


def _new_swarm() -> LocalSwarm:
    """Tracker and peers as processes. One thread each: on few cores more are slower, and sums keep one order."""
    from remote_modules.testing import LocalSwarm

    return LocalSwarm("pydoc-2m", spans=SPANS, mode="process", num_threads=1, dtype="float32", mdns=False)


@contextmanager
def _working(what: str) -> Iterator[None]:
    if output.err.is_terminal:
        with output.err.status(f"{what} ..."):
            yield
    else:
        yield


def _describe(generation: Generation, training: Training, seconds: float) -> dict[str, object]:
    stats = generation.stats
    return {
        "text": generation.text,
        "reference_text": generation.reference_text,
        "identical": generation.is_identical,
        "killed": generation.killed,
        "failovers": stats.failovers,
        "replayed_tokens": stats.replayed_tokens,
        "stall_seconds": round(stats.stall_seconds, 4),
        "route_before": generation.route_before,
        "route_after": output.describe_route(stats.route),
        "tokens_per_s": round(generation.watch.tokens_per_s, 2),
        "train_losses": training.losses,
        "train_losses_local": training.losses_local,
        "losses_agree": training.is_close,
        "seconds_total": round(seconds, 2),
    }


def _heading(number: int, text: str) -> None:
    output.out.print(f"[bold cyan]{number}[/bold cyan]  [bold]{text}[/bold]")


def _body(content: Text | Table) -> None:
    output.out.print(Padding(content, INDENT))


def _print_swarm(swarm: LocalSwarm, took_s: float) -> None:
    _heading(1, f"A swarm on this machine: a tracker and {len(swarm.peers)} peers, each a process of its own")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("peer", "blocks", "pid", "address"):
        table.add_column(name)
    for peer in swarm.peers:
        span = str(peer.span)
        held = f"{span} (one of two)" if SPANS.count(span) > 1 else span
        table.add_row(short_id(peer.peer_id), held, str(peer.pid), peer.address)
    _body(table)
    _body(Text(f"all online after {took_s:.1f} s; tracker and swarm page at {swarm.trackers[0]}", style="dim"))
    output.out.print()


def _print_generation(generation: Generation, prompt: str) -> None:
    stats, watch = generation.stats, generation.watch
    _heading(2, "A sentence that outlives one of its peers")
    text = Text(prompt, style="dim")
    text.append(_on_one_line(generation.before), style="default not dim")
    if generation.killed:
        text.append(" ✂ ", style="bold red not dim")
    text.append(_on_one_line(generation.after), style="green not dim")
    _body(text)
    rows = {
        "route": escape(" => ".join(generation.route_before)),
        "killed": f"[red]{generation.killed}[/red] (pid {generation.killed_pid}), by SIGKILL at the ✂",
        "route then": escape(" => ".join(output.describe_route(stats.route))),
        "failover": f"{stats.failovers}; {stats.replayed_tokens} tokens replayed, stalled {stats.stall_seconds:.2f} s",
        "speed": f"{watch.tokens_per_s:.0f} tokens/s ({watch.num_tokens} in {watch.total_s:.2f} s), failover included",
        "check": _verdict(generation.is_identical, "same tokens as the model run in one process"),
    }
    _body(output.fields_table(rows))
    if not generation.is_identical:
        _body(Text(f"expected: {generation.reference_text}", style="red"))
    output.out.print()


def _print_training(training: Training, num_prompt_tokens: int) -> None:
    _heading(3, f"Fine-tuning through the swarm: a soft prompt of {num_prompt_tokens} tokens, AdamW")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("loss at step")
    for number in range(len(training.losses)):
        table.add_column(str(number + 1), justify="right")
    table.add_row("by the swarm", *(f"{loss:.5f}" for loss in training.losses))
    table.add_row("in one process", *(f"{loss:.5f}" for loss in training.losses_local))
    _body(table)
    _body(output.fields_table({"check": _verdict(training.is_close, "same losses")}))
    output.out.print()


def _on_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def _verdict(is_good: bool, text: str) -> str:
    return f"[green]✓ {text}[/green]" if is_good else f"[red]✗ not the {text}[/red]"


def _print_end(is_good: bool, seconds: float) -> None:
    if not is_good:
        output.out.print(f"[red]Something did not agree[/red] ({seconds:.1f} s); run it with --debug.")
        return
    output.out.print(f"All of it agreed, in {seconds:.1f} s. A swarm of your own, each line in a terminal:")
    for command in (
        "tracker",
        "serve pydoc-2m --blocks 0:4 --tracker http://127.0.0.1:8000",
        "serve pydoc-2m --blocks 4:8 --tracker http://127.0.0.1:8000",
        'generate pydoc-2m --prompt "The function returns a" --tracker http://127.0.0.1:8000',
    ):
        output.out.print(f"   remote-modules {command}", style="bold", markup=False, soft_wrap=True)
