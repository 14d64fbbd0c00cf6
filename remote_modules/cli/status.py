"""``remote-modules status``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from remote_modules.cli import output
from remote_modules.cli.lookup import look_up, online_spans
from remote_modules.cli.options import JsonOption, MdnsOption, PeersOption, Sources, TrackersOption
from remote_modules.peers import PeerRecord, PeerState, short_id
from remote_modules.spans import Span, missing_spans

__all__ = ["status"]

_STYLES = {0: "red", 1: "yellow"}  # of a block by how many hold it; more is green
_STATE_STYLES = {PeerState.JOINING: "yellow", PeerState.ONLINE: "green", PeerState.DRAINING: "red"}


def status(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Hub id or checkpoint folder; all models when left out.")
    ] = None,
    trackers: TrackersOption = None,
    peers: PeersOption = None,
    mdns: MdnsOption = True,
    as_json: JsonOption = False,
) -> None:
    """Show the peers of a swarm: who holds what, which block is weakest, and how fast they are."""
    sources = Sources.of(trackers, peers, mdns)
    model_key = None if model is None else _key_of(model)
    summaries = [_summarize(group) for group in _by_model(look_up(sources, model_key))]
    if as_json:
        output.print_json({"models": summaries})
        return
    if not summaries:
        wanted = "" if model is None else f" of '{model}'"
        output.out.print(f"no peers{wanted} found (asked: {sources})", markup=False, soft_wrap=True)
    for number, summary in enumerate(summaries):
        if number:
            output.out.print()
        _print(summary)


def _key_of(model: str) -> str:
    """What to look up for a model; reads its config only.

    Raises:
        CheckpointError: there is no such model.
    """
    output.quiet_transformers()
    from remote_modules.model.checkpoint import open_checkpoint
    from remote_modules.model.fingerprint import model_key
    from remote_modules.model.loading import read_config

    return model_key(read_config(open_checkpoint(model)))


def _by_model(records: Sequence[PeerRecord]) -> list[list[PeerRecord]]:
    groups: dict[str, list[PeerRecord]] = {}
    for record in sorted(records, key=lambda record: (record.start, record.end, record.peer_id)):
        groups.setdefault(record.model_key, []).append(record)
    return sorted(groups.values(), key=len, reverse=True)


def _summarize(records: Sequence[PeerRecord]) -> dict[str, Any]:
    """One model as JSON values; its name and size are what most of its peers say."""
    num_blocks = Counter(record.num_blocks for record in records).most_common(1)[0][0]
    spans = online_spans(records, num_blocks)
    coverage = [sum(block in span for span in spans) for block in range(num_blocks)]
    return {
        "model": Counter(record.model for record in records).most_common(1)[0][0],
        "model_key": records[0].model_key,
        "num_blocks": num_blocks,
        "coverage": coverage,
        "weakest_block": coverage.index(min(coverage)),
        "missing": [str(span) for span in missing_spans(spans, Span(0, num_blocks))],
        "num_peers": len(records),
        "peers": [_summarize_peer(record) for record in records],
    }


def _summarize_peer(record: PeerRecord) -> dict[str, Any]:
    return {
        "peer_id": record.peer_id,
        "span": str(record.span),
        "state": record.state.value,
        "addresses": list(record.addresses),
        "dtype": record.dtype,
        "quantization": record.quantization,
        "prefill_tokens_per_s": record.prefill_tokens_per_s,
        "decode_tokens_per_s": record.decode_tokens_per_s,
        "free_kv_tokens": record.free_kv_tokens,
        "load": record.load,
        "version": record.version,
    }


def _print(summary: dict[str, Any]) -> None:
    title = Text(summary["model"], style="bold")
    title.append(f"  {summary['num_blocks']} blocks, {_count(summary['num_peers'], 'peer')}", style="not bold")
    output.out.print(title)
    output.out.print(_coverage_bar(summary["coverage"]))
    output.out.print(_verdict(summary))
    output.out.print(_peer_table(summary["peers"]))


def _coverage_bar(coverage: Sequence[int]) -> Text:
    """How many peers hold each block, one character a block, wrapped by the console."""
    bar = Text("coverage  ")
    for count in coverage:
        bar.append(str(count) if count < 10 else "+", style=f"{_STYLES.get(count, 'green')} reverse")
    return bar


def _verdict(summary: dict[str, Any]) -> Text:
    if summary["missing"]:
        return Text(f"blocks {', '.join(summary['missing'])} are missing: no generation is possible", style="red")
    weakest = summary["weakest_block"]
    count = summary["coverage"][weakest]
    if count == 1:
        return Text(f"weakest block {weakest}: 1 peer, no spare", style="yellow")
    return Text(f"weakest block {weakest}: {count} peers", style="green")


def _peer_table(peers: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for name in ("peer", "blocks", "state", "dtype", "address"):
        table.add_column(name, no_wrap=True, overflow="fold")
    for name in ("decode", "prefill", "KV room", "load"):
        table.add_column(name, justify="right", no_wrap=True)
    for peer in peers:
        state = PeerState(peer["state"])
        dtype = peer["dtype"] if peer["quantization"] == "none" else peer["quantization"]
        table.add_row(
            short_id(peer["peer_id"]),
            peer["span"],
            Text(state.value, style=_STATE_STYLES[state]),
            Text(dtype),
            Text("\n".join(peer["addresses"])),
            _short(peer["decode_tokens_per_s"]),
            _short(peer["prefill_tokens_per_s"]),
            _short(peer["free_kv_tokens"]),
            str(peer["load"]),
        )
    table.caption = "decode, prefill: tokens per second through one block, as measured by the peer; KV room: tokens"
    table.caption_justify = "left"
    return table


def _short(number: float) -> str:
    """Three digits or so: 950, 12.3k, 4.5M."""
    for unit in ("", "k", "M", "G"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
