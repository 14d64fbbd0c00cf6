from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from remote_modules.client.stats import HopTiming, StatsRecorder
from remote_modules.errors import UnsupportedCallError
from remote_modules.peers import PeerId
from remote_modules.plan.routing import Hop
from remote_modules.spans import Span
from remote_modules.testing.inline_swarm import InlineSwarm
from remote_modules.training import swarm_metrics
from remote_modules.training.swarm_metrics import SwarmMeter, difference

from .loops import rows

LOWER, UPPER = Hop(PeerId("alice-of-many"), Span(0, 2)), Hop(PeerId("bob-of-many"), Span(2, 4))


def timing(hop: Hop, total_s: float) -> HopTiming:
    return HopTiming(hop=hop, num_tokens=1, total_s=total_s, queue_s=0.25, compute_s=0.5)


def test_counters_are_differences_and_levels_are_not() -> None:
    before = replace(StatsRecorder().snapshot(), failovers=2, bytes_sent=100, history_bytes=50, stall_seconds=0.5)
    after = replace(before, failovers=3, bytes_sent=160, history_bytes=70, stall_seconds=0.75)
    metrics = difference(before, after)
    assert metrics["swarm/failovers"] == 1
    assert metrics["swarm/bytes_sent"] == 60
    assert metrics["swarm/history_bytes"] == 70
    assert metrics["swarm/stall_seconds"] == 0.25
    assert all(isinstance(value, float) for value in metrics.values())


def test_hop_times_are_of_new_passes_only() -> None:
    recorder = StatsRecorder()
    recorder.finish((LOWER, UPPER), [timing(LOWER, 9.0), timing(UPPER, 9.0)])
    before = recorder.snapshot()
    recorder.finish((LOWER, UPPER), [timing(LOWER, 1.0), timing(UPPER, 2.0)])
    recorder.finish((LOWER, UPPER), [timing(UPPER, 4.0), timing(LOWER, 2.0)])
    metrics = difference(before, recorder.snapshot())
    assert metrics["swarm/hop_seconds/0:2"] == 1.5
    assert metrics["swarm/hop_seconds/2:4"] == 3.0
    assert metrics["swarm/queue_seconds"] == 1.0
    assert metrics["swarm/compute_seconds"] == 2.0
    assert metrics["swarm/wire_seconds"] == 0.25 + 1.25 + 3.25 + 1.25


def test_more_passes_than_the_waterfall_keeps_are_counted() -> None:
    recorder = StatsRecorder()
    before = recorder.snapshot()
    for _ in range(100):
        recorder.finish((LOWER,), [timing(LOWER, 1.0)])
    metrics = difference(before, recorder.snapshot())
    assert metrics["swarm/steps"] == 100
    assert metrics["swarm/hop_seconds/0:2"] == 1.0


def test_number_of_spans_is_capped() -> None:
    recorder = StatsRecorder()
    before = recorder.snapshot()
    hops = [Hop(PeerId("alice-of-many"), Span(i, i + 1)) for i in range(swarm_metrics.MAX_SPANS + 5)]
    recorder.finish(tuple(hops), [timing(hop, 1.0) for hop in hops])
    names = [name for name in difference(before, recorder.snapshot()) if "hop_seconds" in name]
    assert len(names) == swarm_metrics.MAX_SPANS


def test_slices_of_one_connection_are_counted_once(checkpoint: Path) -> None:
    with InlineSwarm(checkpoint, ["0:4"]) as swarm:
        model = swarm.load()
        layers = model.model.layers
        meter = SwarmMeter(nn.ModuleList([layers, nn.ModuleDict({"lower": layers[0:2], "upper": layers[2:4]})]))
        model(input_ids=rows()[:1], use_cache=False)
        metrics = meter.read()
        assert metrics["swarm/steps"] == layers.stats().steps == 1
        assert metrics["swarm/bytes_sent"] == layers.stats().bytes_sent
        assert meter.read()["swarm/steps"] == 0
        assert meter.failovers() == 0


def test_model_without_remote_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedCallError, match="Linear has none; attach a RemoteSequential before training"):
        SwarmMeter(nn.Linear(1, 1))
