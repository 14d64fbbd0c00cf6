"""The swarm page: one plain HTML document for people, without script and below 100 KB.

Pure. Every text on it was chosen by a stranger: it is clipped, then escaped, here and nowhere else.
"""

from __future__ import annotations

from html import escape

from remote_modules.discovery.swarm_state import ModelSummary, PeerSummary, SwarmState

__all__ = ["render_page"]

# The caps below keep the worst page (every text clipped and escaped six-fold) under 100 KB; the rest is in
# the JSON.
MAX_MODELS = 10
MAX_CELLS = 128  # for each model; a longer model shows the weakest block of each group
MAX_ROWS = 70  # peers, shared evenly between the models shown

_COLUMNS = (
    "peer",
    "blocks",
    "state",
    "dtype",
    "decode tok/s",
    "prefill tok/s",
    "free KV tokens",
    "load",
    "seen",
)

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="10"><title>remote-modules swarm</title><style>
:root{color-scheme:light dark;--bg:#fff;--fg:#1c1c1e;--dim:#5f6368;--line:#d9dce1;--bar:#eef0f3;
--c0:#c5221f;--c1:#e8a33d;--c2:#7cb67f;--c3:#2e7d4f}
@media (prefers-color-scheme:dark){:root{--bg:#16181c;--fg:#e8eaed;--dim:#9aa0a6;--line:#3a3f47;--bar:#23272e;
--c0:#f0625d;--c1:#c98a2b;--c2:#4f8f5c;--c3:#7bd39a}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.3rem}h2{font-size:1.05rem;margin:2rem 0 .3rem;overflow-wrap:anywhere}p{margin:.3rem 0}
.dim,small{color:var(--dim)}.bad{color:var(--c0);font-weight:600}
.bar{display:flex;gap:1px;height:1.6rem;background:var(--bar);border-radius:4px;overflow:hidden}
.bar i{flex:1;min-width:1px}.c0{background:var(--c0)}.c1{background:var(--c1)}.c2{background:var(--c2)}
.c3{background:var(--c3)}
.key i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .3em 0 .9em}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;margin-top:.6rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.25rem .8rem .25rem 0;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--dim)}td.n,th.n{text-align:right}code{font-size:.95em}
</style></head><body><main>
"""

_KEY = """<p class="key dim">online peers for each block:<i class="c0"></i>none<i class="c1"></i>1
<i class="c2"></i>2<i class="c3"></i>3 or more</p>
"""


def render_page(state: SwarmState) -> str:
    """The document for ``state``."""
    shown = state.models[:MAX_MODELS]
    parts = [_HEAD, f"<h1>remote-modules swarm</h1>\n<p>{_count(state.num_peers, 'peer')}, "]
    parts.append(f'{_count(state.num_models, "model")} <span class="dim">(page reloads every 10 s)</span></p>\n')
    if shown:
        parts.append(_KEY)
        parts.extend(_model(model, MAX_ROWS // len(shown)) for model in shown)
    else:
        parts.append("<p>No peer has announced itself yet. Start one:</p>\n")
        parts.append("<p><code>remote-modules serve MODEL --tracker URL-OF-THIS-PAGE</code></p>\n")
    if state.num_models > len(shown):
        parts.append(f"<p>{_count(state.num_models - len(shown), 'more model')} not shown.</p>\n")
    parts.append('<p><small>As JSON: <a href="api/v1/state">api/v1/state</a>. Peers describe themselves; nothing here ')
    parts.append("is checked by the tracker but their signatures.</small></p>\n</main></body></html>\n")
    return "".join(parts)


def _model(model: ModelSummary, max_rows: int) -> str:
    weakest = model.coverage[model.weakest_block]
    covered = sum(count > 0 for count in model.coverage)
    if weakest == 0:
        missing = ", ".join(f"{start}:{end}" for start, end, count in _runs(model.coverage) if count == 0)
        verdict = f'<span class="bad">not usable: no peer for blocks {_clip(missing, 60)}</span>'
    else:
        verdict = f"weakest block {model.weakest_block} ({_count(weakest, 'peer')})"
    rows = "".join(map(_row, model.peers[:max_rows]))
    hidden = model.num_peers - min(len(model.peers), max_rows)
    more = f'<p class="dim">and {_count(hidden, "more peer")}</p>\n' if hidden else ""
    heads = "".join(f'<th scope="col"{_numeric(index)}>{name}</th>' for index, name in enumerate(_COLUMNS))
    name = _clip(model.model, 60)
    return (
        f"<section><h2>{name} <small>{_clip(model.model_key, 12)}</small></h2>\n"
        f"<p>{covered} of {model.num_blocks} blocks covered; {verdict}</p>\n{_bar(model.coverage)}"
        f'<div class="scroll"><table aria-label="peers of {name}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div>\n{more}</section>\n"
    )


def _bar(coverage: list[int]) -> str:
    runs = _runs(coverage)
    spoken = ", ".join(f"{start}:{end} {_count(count, 'peer')}" for start, end, count in runs[:16])
    if len(runs) > 16:
        spoken += f", and {len(runs) - 16} more ranges"
    per_cell = -(-len(coverage) // MAX_CELLS)
    cells = "".join(_cell(coverage, start, per_cell) for start in range(0, len(coverage), per_cell))
    return f'<div class="bar" role="img" aria-label="coverage of blocks: {spoken}">{cells}</div>\n'


def _cell(coverage: list[int], start: int, per_cell: int) -> str:
    count = min(coverage[start : start + per_cell])
    return f'<i class="c{min(count, 3)}" title="{start}: {count}"></i>'


def _runs(coverage: list[int]) -> list[tuple[int, int, int]]:
    """Neighbouring blocks of equal coverage, as (start, end, peers)."""
    runs: list[tuple[int, int, int]] = []
    for block, count in enumerate(coverage):
        if runs and runs[-1][2] == count:
            runs[-1] = (runs[-1][0], block + 1, count)
        else:
            runs.append((block, block + 1, count))
    return runs


def _row(peer: PeerSummary) -> str:
    dtype = peer.dtype if peer.quantization == "none" else f"{peer.dtype} {peer.quantization}"
    cells = (
        f"<code>{_clip(peer.id, 6)}</code>",
        peer.span,
        peer.state,
        _clip(dtype, 20),
        _clip(f"{peer.decode_tokens_per_s:,.0f}", 12),
        _clip(f"{peer.prefill_tokens_per_s:,.0f}", 12),
        _clip(f"{peer.free_kv_tokens:,}", 12),
        _clip(str(peer.load), 6),
        f"{peer.age_s:.0f} s ago",
    )
    return "<tr>" + "".join(f"<td{_numeric(i)}>{cell}</td>" for i, cell in enumerate(cells)) + "</tr>\n"


def _numeric(column: int) -> str:
    return ' class="n"' if column >= 4 else ""


def _clip(text: str, length: int) -> str:
    return escape(text if len(text) <= length else text[: length - 1] + "…")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
