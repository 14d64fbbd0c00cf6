"""The swarms of the random simulations, and how to run one seed on one of them."""

from __future__ import annotations

from remote_modules.testing.virtual_time import run_virtual

from .scenario import Report, random_run
from .tiny import TinyModel, tiny_model

SWARMS = {
    "pairs": ("0:2", "0:2", "2:4", "2:4"),
    "uneven": ("0:1", "0:3", "1:4", "2:4", "3:4"),
    "one_holds_all": ("0:4", "0:2", "2:4"),
    "single_copies": ("0:2", "2:4"),
    "triples": ("0:1", "0:1", "1:3", "1:3", "3:4", "3:4"),
}
NUM_BLOCKS = 4
ALL_SPANS = tuple(sorted({span for spans in SWARMS.values() for span in spans}))


def swarm_model() -> TinyModel:
    return tiny_model(NUM_BLOCKS, ALL_SPANS)


def run_seed(name: str, seed: int, kinds: list[str] | None = None, most: int = 5) -> Report:
    """One run; an error that reaches the client is a violation, too."""
    try:
        return run_virtual(random_run(swarm_model(), SWARMS[name], seed, kinds, most))
    except Exception as exc:
        raise AssertionError(f"seed {seed} of '{name}' ended with {type(exc).__name__}: {exc}") from exc


def check(name: str, report: Report) -> None:
    """Nothing broke; says the seed first."""
    first = report.violations[0] if report.violations else ""
    text = f"seed {report.seed} of '{name}': {first} ({len(report.violations)} violations); faults: {report.faults}"
    assert not report.violations, (
        f"{text}; again: pytest tests/simulation/test_random_faults.py --seed {report.seed} --seeds 1 -k {name}-0"
    )
