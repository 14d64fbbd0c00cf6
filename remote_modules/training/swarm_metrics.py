"""What happened in the swarm between two moments, as a flat dict of floats that any logger takes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from remote_modules.client.sequential import RemoteSequential
from remote_modules.client.stats import ClientStats, HopTiming
from remote_modules.errors import UnsupportedCallError

__all__ = ["PREFIX", "SwarmMeter", "difference"]

PREFIX = "swarm/"
MAX_SPANS = 64  # with a metric of their own in one reading
_LEVELS = frozenset({"history_bytes", "history_disk_bytes"})  # what is kept now; the other numbers only grow


def difference(before: ClientStats, after: ClientStats) -> dict[str, float]:
    """What changed from ``before`` to ``after``, by names that begin with `PREFIX`.

    Every counter of `ClientStats` is there by its own name, minus its earlier value, and every level as it is. Of the
    passes in between, as far as the waterfall still has them: ``hop_seconds/<span>`` is the mean of a request to the
    hop of that span, and ``queue_seconds``, ``compute_seconds`` and ``wire_seconds`` are sums over all hops.
    """
    metrics: dict[str, float] = {}
    for field in dataclasses.fields(after):
        value, earlier = getattr(after, field.name), getattr(before, field.name)
        if isinstance(value, int | float):
            metrics[PREFIX + field.name] = float(value if field.name in _LEVELS else value - earlier)
    num_new = min(after.steps - before.steps, len(after.waterfall))
    return metrics | _hop_times(
        timing for timings in after.waterfall[len(after.waterfall) - num_new :] for timing in timings
    )


def _hop_times(timings: Iterable[HopTiming]) -> dict[str, float]:
    sums = dict.fromkeys(("queue_seconds", "compute_seconds", "wire_seconds"), 0.0)
    totals: dict[str, list[float]] = defaultdict(list)
    for timing in timings:
        sums["queue_seconds"] += timing.queue_s
        sums["compute_seconds"] += timing.compute_s
        sums["wire_seconds"] += timing.wire_s
        span = str(timing.hop.span)
        if span in totals or len(totals) < MAX_SPANS:
            totals[span].append(timing.total_s)
    by_span = {f"{PREFIX}hop_seconds/{span}": sum(values) / len(values) for span, values in totals.items()}
    return {PREFIX + name: value for name, value in sums.items()} | by_span


class SwarmMeter:
    """Reads what happened since the last reading, of all remote blocks of a model.

    Args:
        model: with at least one `RemoteSequential` in it; several that share a connection are counted once.

    Raises:
        UnsupportedCallError: there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, RemoteSequential)]
        if not layers:
            raise UnsupportedCallError(
                f"expected a model with remote blocks, {type(model).__name__} has none; "
                "attach a RemoteSequential before training, or leave the callback out"
            )
        self._layers = list({id(one._handle): one for one in layers}.values())
        self._start = [one.stats() for one in self._layers]
        self._last = self._start

    def read(self) -> dict[str, float]:
        """The difference to the last reading, or to the beginning."""
        before, self._last = self._last, [one.stats() for one in self._layers]
        metrics: dict[str, float] = {}
        for earlier, later in zip(before, self._last, strict=True):
            for name, value in difference(earlier, later).items():
                metrics[name] = metrics.get(name, 0.0) + value
        return metrics

    def failovers(self) -> int:
        """Since the beginning."""
        pairs = zip(self._layers, self._start, strict=True)
        return sum(one.stats().failovers - start.failovers for one, start in pairs)
