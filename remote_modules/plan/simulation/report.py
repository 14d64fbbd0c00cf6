"""What a simulated swarm did: samples over time, and totals since the end of its warm-up."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Gap", "Report", "Sample"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A swarm at one moment.

    Attributes:
        num_peers: that run, loading ones among them.
        num_leases: in the tracker's table: those, and the crashed ones whose lease has not ended.
        throughput: of the weakest block, over the peers that serve; tokens per second.
        announced: the same over the records in the tracker, where a peer that loads counts already.
        bound: `relaxation_bound` of the peers that have loaded once: what the best spans would give if moving took no
            time.
        num_missing: blocks that nobody serves.
    """

    at_s: float
    num_peers: int
    num_leases: int
    throughput: float
    announced: float
    bound: float
    num_missing: int

    @property
    def share(self) -> float:
        """Throughput as a part of the bound; 1 where nothing is possible."""
        return self.throughput / self.bound if self.bound > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in which a block had no holder that serves.

    Attributes:
        is_move: whether it opened because a holder moved away; else one left.
        ended_s: infinite while it lasts.
    """

    began_s: float
    ended_s: float
    is_move: bool


@dataclass(slots=True)
class Report:
    """Everything counted here happened after the warm-up.

    Attributes:
        record_bytes: of announcements, to the tracker.
        lookup_bytes: of answers with all records of the swarm, from the tracker.
        largest_lookup_bytes: of one such answer.
        route_ok, route_stale, route_none: routes of clients that all their peers could serve; that had a peer which was
            gone or loading; that could not be made as a block was in no record.
        route_hops: of all routes that were found.
        moved_blocks: of all moves, blocks that the mover had not held in memory before.
    """

    samples: list[Sample] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    measured_s: float = 0.0
    num_joins: int = 0
    num_crashes: int = 0
    num_withdrawals: int = 0
    num_checks: int = 0
    num_moves: int = 0
    moved_blocks: int = 0
    loading_s: float = 0.0
    num_announces: int = 0
    num_lookups: int = 0
    record_bytes: int = 0
    lookup_bytes: int = 0
    largest_lookup_bytes: int = 0
    route_ok: int = 0
    route_stale: int = 0
    route_none: int = 0
    route_hops: int = 0

    @property
    def mean_share(self) -> float:
        """Mean of `Sample.share`; not a number before the first sample."""
        return _mean([sample.share for sample in self.samples])

    @property
    def throughput_ratio(self) -> float:
        """Mean throughput over mean bound, so that moments with many peers count more."""
        return _mean([sample.throughput for sample in self.samples]) / _mean([sample.bound for sample in self.samples])

    @property
    def gap_s(self) -> float:
        """Time without full coverage."""
        return sum(self.gap_durations_s)

    @property
    def gap_durations_s(self) -> list[float]:
        """Of each gap, in the order in which they began; one that has not ended counts until now."""
        end_s = self.samples[-1].at_s if self.samples else 0.0
        return [max(0.0, min(gap.ended_s, end_s) - gap.began_s) for gap in self.gaps]

    def per_hour(self, count: float) -> float:
        return 3600.0 * count / self.measured_s

    def per_s(self, count: float) -> float:
        return count / self.measured_s


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
