"""``remote-modules serve``."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from remote_modules.cli import output
from remote_modules.cli.options import (
    SWARM,
    CacheDirOption,
    JsonOption,
    MdnsOption,
    ModelArgument,
    PeersOption,
    RevisionOption,
    Sources,
    TokenOption,
    TrackersOption,
)
from remote_modules.cli.signals import StopSignals
from remote_modules.config import ServerConfig
from remote_modules.peers import short_id

if TYPE_CHECKING:
    from remote_modules.server.server import Server

__all__ = ["serve"]

MAX_INTERRUPT_DRAIN_S = 1.5  # whoever presses Ctrl-C waits for nothing longer: 2 s with what stopping itself takes
DEFAULTS = ServerConfig(model="any")
BLOCKS = "Blocks"
LIMITS = "Limits"
NETWORK = "Network"

_of_blocks = partial(typer.Option, rich_help_panel=BLOCKS)
_of_limits = partial(typer.Option, rich_help_panel=LIMITS)
_of_network = partial(typer.Option, rich_help_panel=NETWORK)
_of_swarm = partial(typer.Option, rich_help_panel=SWARM)


def serve(
    model: ModelArgument,
    trackers: TrackersOption = None,
    peers: PeersOption = None,
    mdns: MdnsOption = True,
    blocks: Annotated[
        str | None, _of_blocks("--blocks", metavar="A:B", help="Span to hold. [dim]Default: what is needed most.[/dim]")
    ] = None,
    num_blocks: Annotated[
        int | None,
        _of_blocks("--num-blocks", min=1, metavar="N", help="How many to hold. [dim]Default: all that fit.[/dim]"),
    ] = None,
    device: Annotated[
        str, _of_blocks("--device", metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")
    ] = DEFAULTS.device,
    dtype: Annotated[
        str, _of_blocks("--dtype", metavar="auto|float32|bfloat16|float16", help="'auto' is the checkpoint's.")
    ] = DEFAULTS.dtype,
    quantization: Annotated[
        str,
        _of_blocks(
            "--quantization",
            metavar="none|int8|nf4",
            help="Of the weights: 1/2 or 1/4 of bfloat16's memory. Needs pip install 'remote-modules\\[quantization]'.",
        ),
    ] = DEFAULTS.quantization,
    head: Annotated[
        bool, _of_blocks("--head", help="With the last blocks, also run the LM head for clients that ask for it.")
    ] = DEFAULTS.head,
    graphs: Annotated[
        bool, _of_blocks("--graphs/--no-graphs", help="Capture steps of one token as CUDA graphs, where possible.")
    ] = DEFAULTS.graphs,
    compile_rows: Annotated[
        list[int] | None,
        _of_blocks(
            "--compile",
            metavar="ROWS",
            help="Compile the blocks for steps of so many rows (1, 2, 4, ... 64) before going online; repeatable.",
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        _of_blocks(
            "--adapter",
            metavar="[NAME=]PATH|ID",
            help="A LoRA to offer, as peft saves it: folder or hub id; repeatable.",
        ),
    ] = None,
    host: Annotated[str, _of_network("--host", help="Where to listen; 0.0.0.0 for all interfaces.")] = DEFAULTS.host,
    port: Annotated[
        int, _of_network("--port", min=0, max=65535, metavar="PORT", help="0: any free one.")
    ] = DEFAULTS.port,
    announce: Annotated[
        list[str] | None,
        _of_network(
            "--announce",
            metavar="HOST:PORT",
            help="What others dial, if not where it listens (port forwarding); up to 4.",
        ),
    ] = None,
    identity: Annotated[
        Path | None,
        _of_network(
            "--identity",
            metavar="PATH",
            help="Key file, made when missing. [dim]Default: a new identity each time.[/dim]",
        ),
    ] = None,
    kv_gib: Annotated[
        float | None,
        _of_limits("--kv-gib", metavar="GIB", help="Memory for KV caches. [dim]Default: half of what is free.[/dim]"),
    ] = None,
    activation_gib: Annotated[
        float | None,
        _of_limits(
            "--activation-gib",
            "--activation-budget",
            min=0.0,
            metavar="GIB",
            help="Memory for graphs kept for backwards; 0: none. [dim]Default: a quarter of what is free.[/dim]",
        ),
    ] = None,
    num_threads: Annotated[
        int | None, _of_limits("--threads", "--num-threads", min=1, metavar="N", help="CPU threads.")
    ] = None,
    max_batch_tokens: Annotated[
        int, _of_limits("--max-batch-tokens", min=1, metavar="N", help="Rows x tokens of one request.")
    ] = DEFAULTS.max_batch_tokens,
    batching: Annotated[
        bool,
        _of_limits(
            "--batching/--no-batching",
            help="Run decode steps of several sessions as one; off: each alone, on a CPU to the last bit as locally.",
        ),
    ] = DEFAULTS.batching,
    max_sessions: Annotated[
        int, _of_limits("--max-sessions", min=1, metavar="N", help="Open at once.")
    ] = DEFAULTS.max_sessions,
    max_queue: Annotated[
        int, _of_limits("--max-queue", min=1, metavar="N", help="Requests that may wait.")
    ] = DEFAULTS.max_queue,
    max_connections: Annotated[
        int, _of_limits("--max-connections", min=1, metavar="N", help="Open at once.")
    ] = DEFAULTS.max_connections,
    session_idle_s: Annotated[
        float, _of_limits("--session-idle-s", metavar="SECONDS", help="Idle sessions are dropped after this.")
    ] = DEFAULTS.session_idle_s,
    orphan_session_s: Annotated[
        float, _of_limits("--orphan-session-s", metavar="SECONDS", help="The same once the client is gone.")
    ] = DEFAULTS.orphan_session_s,
    announce_interval_s: Annotated[
        float, _of_swarm("--announce-interval-s", metavar="SECONDS", help="Between announcements.")
    ] = DEFAULTS.announce_interval_s,
    drain_s: Annotated[
        float,
        _of_limits(
            "--drain-s",
            min=0.0,
            metavar="SECONDS",
            help=f"Longest wait for running sessions on SIGTERM; Ctrl-C waits {MAX_INTERRUPT_DRAIN_S:g} s at most.",
        ),
    ] = DEFAULTS.drain_s,
    revision: RevisionOption = None,
    cache_dir: CacheDirOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold some blocks of a model and run them for others.

    SIGTERM and Ctrl-C drain: clients move to other peers before this one stops. A second Ctrl-C stops at once.
    """
    sources = Sources.of(trackers, peers, mdns)
    config = ServerConfig(
        model=model,
        blocks=blocks,
        num_blocks=num_blocks,
        host=host,
        port=port,
        announce_addresses=tuple(announce or ()),
        trackers=sources.trackers,
        mdns=sources.mdns,
        peers=sources.peers,
        device=device,
        dtype=dtype,
        quantization=quantization,
        head=head,
        graphs=graphs,
        compile_rows=tuple(compile_rows or ()),
        adapters=tuple(adapters or ()),
        revision=revision,
        cache_dir=None if cache_dir is None else str(cache_dir),
        token=token,
        identity_path=identity,
        kv_budget_bytes=_bytes_of(kv_gib),
        activation_budget_bytes=_bytes_of(activation_gib),
        max_batch_tokens=max_batch_tokens,
        batching=batching,
        max_sessions=max_sessions,
        max_queue=max_queue,
        max_connections=max_connections,
        session_idle_s=session_idle_s,
        orphan_session_s=orphan_session_s,
        announce_interval_s=announce_interval_s,
        drain_s=drain_s,
        num_threads=num_threads,
    )
    _run(config, sources, as_json=as_json)


def _bytes_of(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)


def _run(config: ServerConfig, sources: Sources, *, as_json: bool) -> None:
    with StopSignals() as signals:
        server = _start(config, signals)
        try:
            signals.keep()
            if as_json:
                _print_online(server)
            else:
                _describe(server, sources)
            received = signals.wait(unless=lambda: server.failure)
            _drain(server, received)
        finally:
            server.stop()
    if received == signal.SIGINT:
        raise KeyboardInterrupt


def _start(config: ServerConfig, signals: StopSignals) -> Server:
    with _progress() as show:
        show("importing torch and transformers", 0.0)
        with signals.deferred():
            output.quiet_transformers()
            from remote_modules.server.server import Server

        show("reading the checkpoint", 0.05)
        server = Server(config, on_progress=show)
        server.start()
    return server


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, if that is a terminal; gone when done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=output.err, transient=True, disable=not output.err.is_terminal) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda stage, fraction: progress.update(task, description=stage, completed=fraction)


def _print_online(server: Server) -> None:
    output.print_json(
        {
            "event": "online",
            "peer_id": server.peer_id,
            "address": server.address,
            "span": str(server.span),
            "pid": os.getpid(),
        }
    )


def _describe(server: Server, sources: Sources) -> None:
    config = server.config
    how = sources.arguments()
    if not sources.trackers:
        how = f"--peer {server.address}"
    rows = {
        "model": config.model,
        "peer": short_id(server.peer_id),
        "blocks": f"{server.span} ({len(server.span)})",
        "address": server.address,
        **({"adapters": ", ".join(config.adapters)} if config.adapters else {}),
        "announced to": str(sources) if sources.trackers or sources.mdns else "nobody; clients must name its address",
    }
    output.out.print(output.fields_table(rows))
    output.print_command("use it by", f'remote-modules generate {shlex.quote(config.model)} --prompt "..." {how}')
    output.out.print("Ctrl-C drains and stops it.", style="dim")


def _drain(server: Server, received: signal.Signals) -> None:
    limit_s = server.config.drain_s
    if received == signal.SIGINT:
        limit_s = min(limit_s, MAX_INTERRUPT_DRAIN_S)
    output.err.print(f"draining: no new sessions, running ones have {limit_s:g} s to end or move")
    server.drain(limit_s)
    output.err.print("stopped")
