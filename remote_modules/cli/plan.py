"""``remote-modules plan``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from remote_modules.cli import output
from remote_modules.cli.options import (
    CacheDirOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    RevisionOption,
    TokenOption,
)
from remote_modules.config import ServerConfig
from remote_modules.errors import first_line

if TYPE_CHECKING:
    from remote_modules.plan.swarm_plan import PlannedServer, SwarmPlan
    from remote_modules.plan.throughput import Layout
    from remote_modules.server.load_plan import LoadPlan

__all__ = ["PeersFile", "plan", "read_peers"]

MAX_PEERS = 1000
MAX_FILE_BYTES = 1024 * 1024


class PeerEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One peer of the file; either ``memory_gib`` or ``max_blocks``."""

    name: str
    tokens_per_s: float
    memory_gib: float | None = None
    max_blocks: int | None = None
    bandwidth_mbit: float | None = None
    rtt_s: float = 0.0

    def __post_init__(self) -> None:
        if (self.memory_gib is None) == (self.max_blocks is None):
            raise ValueError(f"peer '{self.name}' must have memory_gib or max_blocks, and not both")
        for name in ("tokens_per_s", "memory_gib", "max_blocks", "bandwidth_mbit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} of peer '{self.name}' must be positive and finite, got {value}")
        if not 0 <= self.rtt_s < math.inf:
            raise ValueError(f"rtt_s of peer '{self.name}' must not be negative, got {self.rtt_s}")


class PeersFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file holds: ``[[peers]]`` in TOML, ``{"peers": [...]}`` or the bare list in JSON."""

    peers: list[PeerEntry]


def plan(
    model: ModelArgument,
    peers: Annotated[
        Path,
        typer.Option(
            "--peers",
            metavar="FILE",
            help="TOML or JSON: of each peer name, tokens_per_s (through one block, as 'status' shows under decode), "
            "memory_gib or max_blocks, and if known bandwidth_mbit and rtt_s.",
        ),
    ],
    dtype: DtypeOption = "auto",
    quantization: Annotated[
        str, typer.Option("--quantization", metavar="none|int8|nf4", help="Of the weights on the peers.")
    ] = "none",
    kv_tokens: Annotated[
        int | None, typer.Option("--kv-tokens", min=0, metavar="N", help="Room for KV cache in each block, in tokens.")
    ] = None,
    workspace_gib: Annotated[
        float, typer.Option("--workspace-gib", min=0.0, metavar="GIB", help="Kept free on each peer for activations.")
    ] = 0.5,
    keep_all: Annotated[bool, typer.Option("--keep-all", help="Leave out nobody, however slow.")] = False,
    revision: RevisionOption = None,
    cache_dir: CacheDirOption = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Plan a swarm: which peer should hold which blocks, how fast that is, and who is better left out.

    Reads the model's config and no weights. Exits with 1 if the peers cannot hold the model.
    """
    entries = read_peers(peers)
    config = ServerConfig(
        model=model,
        num_blocks=1,
        dtype=dtype,
        quantization=quantization,
        revision=revision,
        cache_dir=None if cache_dir is None else str(cache_dir),
        token=token,
    )
    output.quiet_transformers()
    from remote_modules.plan.swarm_plan import plan_swarm
    from remote_modules.server.capacity import KV_TOKENS
    from remote_modules.server.load_plan import LoadPlan

    read = LoadPlan.read(config)
    layout = read.layout(KV_TOKENS if kv_tokens is None else kv_tokens)
    servers = [_server(entry, read, workspace_gib) for entry in entries]
    made = plan_swarm(layout, servers, rng=Random(0), may_drop=not keep_all)
    if as_json:
        output.print_json(_as_json(model, layout, made))
    else:
        _print(layout, servers, made)
    if made.missing:
        raise typer.Exit(1)


def read_peers(path: Path) -> list[PeerEntry]:
    """The peers in a file.

    Raises:
        ValueError: the file is neither TOML nor JSON of the right form, or lists no peer or too many.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"peers file '{path}' must be at most {MAX_FILE_BYTES} bytes")
    try:
        if path.suffix.lower() == ".json":
            entries = _from_json(content)
        else:
            entries = msgspec.toml.decode(content, type=PeersFile).peers
    except msgspec.DecodeError as exc:
        raise ValueError(f"peers file '{path}': {first_line(exc)}") from exc
    except UnicodeDecodeError as exc:
        raise ValueError(f"peers file '{path}' must be UTF-8 text") from exc
    if not 0 < len(entries) <= MAX_PEERS:
        raise ValueError(f"peers file '{path}' must list 1 to {MAX_PEERS} peers, got {len(entries)}")
    return entries


def _from_json(content: bytes) -> list[PeerEntry]:
    if content.lstrip().startswith(b"["):
        return msgspec.json.decode(content, type=list[PeerEntry])
    return msgspec.json.decode(content, type=PeersFile).peers


def _server(entry: PeerEntry, read: LoadPlan, workspace_gib: float) -> PlannedServer:
    from remote_modules.plan.swarm_plan import PlannedServer
    from remote_modules.plan.throughput import Capacity

    room_bytes = math.inf if entry.memory_gib is None else (entry.memory_gib - workspace_gib) * 2**30
    network = math.inf if entry.bandwidth_mbit is None else entry.bandwidth_mbit * 125_000 / read.token_bytes
    capacity = Capacity(
        tokens_per_s=entry.tokens_per_s,
        max_blocks=entry.max_blocks or read.num_blocks,
        room_bytes=room_bytes,
        network_tokens_per_s=network,
    )
    return PlannedServer(name=entry.name, capacity=capacity, rtt_s=entry.rtt_s)


def _as_json(model: str, layout: Layout, made: SwarmPlan) -> Mapping[str, object]:
    is_covered = not made.missing
    return {
        "model": model,
        "num_blocks": layout.num_blocks,
        "spans": {name: str(span) for name, span in made.spans.items()},
        "dropped": [{"name": dropped.name, "reason": dropped.reason} for dropped in made.dropped],
        "missing": [str(span) for span in made.missing],
        "bottleneck_tokens_per_s": made.bottleneck_tokens_per_s,
        "bound_tokens_per_s": made.bound_tokens_per_s,
        "one_client_tokens_per_s": 1.0 / made.token_s if is_covered else 0.0,
        "num_hops": made.num_hops,
    }


def _print(layout: Layout, servers: Sequence[PlannedServer], made: SwarmPlan) -> None:
    output.out.print(_table(servers, made))
    output.out.print("tokens/s: on each of its blocks, while all are busy", style="dim")
    for dropped in made.dropped:
        line = Text.assemble(("left out ", "yellow"), dropped.name, f": {dropped.reason}")
        output.out.print(line, soft_wrap=True)
    if made.missing:
        missing = ", ".join(map(str, made.missing))
        line = Text(f"blocks {missing} of {layout.num_blocks} fit nowhere: add peers, memory or quantization", "red")
        output.out.print(line, soft_wrap=True)
        return
    share = made.bottleneck_tokens_per_s / made.bound_tokens_per_s
    rows = {
        "all clients": f"{made.bottleneck_tokens_per_s:.3g} tokens/s at the weakest block, {share:.0%} of what no plan "
        "exceeds",
        "one client": f"{1.0 / made.token_s:.3g} tokens/s on the fastest route",
        "hops": f"{made.num_hops} at least",
    }
    output.out.print(output.fields_table(rows))


def _table(servers: Sequence[PlannedServer], made: SwarmPlan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("peer", overflow="fold")
    table.add_column("blocks", no_wrap=True)
    for name in ("count", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    placed = [(made.spans[server.name], server) for server in servers if server.name in made.spans]
    for span, server in sorted(placed, key=lambda pair: (pair[0], pair[1].name)):
        throughput = server.capacity.throughput(len(span))
        table.add_row(Text(server.name), str(span), str(len(span)), f"{throughput:.3g}")
    return table
