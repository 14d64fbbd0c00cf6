"""Figures of a report."""

from __future__ import annotations

import math

from remote_modules.plan.simulation.report import Gap, Report, Sample


def sample(at_s: float, throughput: float, bound: float) -> Sample:
    return Sample(
        at_s=at_s, num_peers=1, num_leases=1, throughput=throughput, announced=1.0, bound=bound, num_missing=0
    )


def test_shares_are_means_over_the_samples() -> None:
    report = Report(samples=[sample(0, 5.0, 10.0), sample(10, 10.0, 10.0), sample(20, 30.0, 40.0)])
    assert report.mean_share == 0.75
    assert report.throughput_ratio == 0.75
    assert Report(samples=[sample(0, 1.0, 10.0), sample(10, 90.0, 90.0)]).mean_share == 0.55
    assert Report(samples=[sample(0, 1.0, 10.0), sample(10, 90.0, 90.0)]).throughput_ratio == 0.91


def test_nothing_of_nothing_is_all_of_it() -> None:
    assert sample(0, 0.0, 0.0).share == 1.0


def test_report_without_samples_has_no_share() -> None:
    assert math.isnan(Report().mean_share)
    assert Report().gap_durations_s == []


def test_gap_that_lasts_counts_until_the_last_sample() -> None:
    report = Report(samples=[sample(0, 1, 1), sample(50, 1, 1)], gaps=[Gap(5.0, 9.0, False), Gap(20.0, math.inf, True)])
    assert report.gap_durations_s == [4.0, 30.0]
    assert report.gap_s == 34.0


def test_rates_are_per_measured_time() -> None:
    report = Report(measured_s=1800.0)
    assert report.per_hour(10) == 20.0
    assert report.per_s(900) == 0.5
