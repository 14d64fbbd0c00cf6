"""Whole swarms in virtual time, up to 10^5 peers, on the decisions of `remote_modules.plan`; see docs/simulation.md."""

from __future__ import annotations

from remote_modules.plan.simulation.conditions import Conditions
from remote_modules.plan.simulation.report import Report, Sample
from remote_modules.plan.simulation.strategies import BalanceAlways, BalanceAtJoin, RandomSpans, Strategy
from remote_modules.plan.simulation.swarm import SwarmSimulation

__all__ = [
    "BalanceAlways",
    "BalanceAtJoin",
    "Conditions",
    "RandomSpans",
    "Report",
    "Sample",
    "Strategy",
    "SwarmSimulation",
]
