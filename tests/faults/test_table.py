"""``docs/faults.md`` lists all rows and the tests that there are, each with figures or a reason."""

from __future__ import annotations

import ast
import re

import pytest

from .conftest import ROOT
from .recorder import FaultLog, Record, marked_tests, render
from .rows import ELSEWHERE, LATER, ROWS

DOCUMENT = ROOT / "docs" / "faults.md"


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def tables() -> tuple[list[list[str]], list[list[str]]]:
    """Cells of the measurements, and of the list of tests."""
    lines = [line for line in DOCUMENT.read_text("utf-8").splitlines() if re.match(r"\| F\d\d \|", line)]
    cells = list(map(cells_of, lines))
    return [row for row in cells if len(row) == 9], [row for row in cells if len(row) == 4]


def test_rows_are_those_of_the_matrix_in_order() -> None:
    measurements, tests = tables()
    assert list(dict.fromkeys(row for row, *_ in measurements)) == list(ROWS)
    assert [row for row, *_ in tests] == list(ROWS)


def test_every_row_has_figures_or_a_reason() -> None:
    measurements, _ = tables()
    measured = {row for rows in marked_tests().values() for row in rows}
    assert measured | LATER.keys() == ROWS.keys()
    assert not measured & LATER.keys()
    for row, fault, injected, fired, outcome, figure, limit, is_met, clock in measurements:
        assert fault == ROWS[row].fault
        if row in LATER:
            assert injected == f"not yet: {LATER[row]}"
            continue
        assert int(fired) > 0
        assert outcome
        assert re.match(r"[\d.,e+-]+ \S", figure)
        assert re.match(r"[≤≥] [\d.,e+-]+ \S", limit)
        assert is_met in ("yes", "**no**")
        assert clock in ("virtual", "real")


def test_tests_are_those_that_exist() -> None:
    _, lines = tables()
    for row, bar, tests, elsewhere in lines:
        own = sorted(test for test, rows in marked_tests().items() if row in rows)
        assert bar == ROWS[row].bar
        assert re.findall(r"`([^`]+)`", tests) == [test.removeprefix("tests/") for test in own]
        assert re.findall(r"`([^`]+)`", elsewhere) == [t.removeprefix("tests/") for t in ELSEWHERE.get(row, ())]


@pytest.mark.parametrize("test", sorted({test for tests in ELSEWHERE.values() for test in tests}))
def test_test_elsewhere_exists(test: str) -> None:
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_virtual_figure_beyond_its_limit_fails_and_a_real_one_is_only_shown() -> None:
    log = FaultLog("tests/faults/test_table.py::nothing", ("F01",))
    line = {"injected": "x", "outcome": "y", "figure": 2.0, "unit": "s", "at_most": 1.0}
    with pytest.raises(AssertionError, match=r"F01: 2.0 s, limit 1.0"):
        log.record("F01", fired=1, clock="virtual", **line)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="never happened"):
        log.record("F01", fired=0, **line)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="not marked"):
        log.record("F02", fired=1, **line)  # type: ignore[arg-type]
    log.record("F01", fired=1, **line)  # type: ignore[arg-type]
    assert [record.is_met for record in log.records] == [False]
    assert "| F01 | a peer is killed | x | 1 | y | 2 s | ≤ 1 s | **no** | real |" in render(log.records)


def test_floor_is_met_from_above() -> None:
    record = Record("F38", "x", 1, "y", 0.95, "of the peak", 0.9, True, "virtual", "t")
    assert record.is_met
    assert "| 0.95 of the peak | ≥ 0.9 of the peak | yes | virtual |" in render([record])
