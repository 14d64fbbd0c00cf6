from __future__ import annotations

from pathlib import Path

import pytest

from remote_modules.cli import bench

from .program import invoke

SCRIPT = '''"""Measures nothing.

At length.
"""

import sys

sys.exit(len(sys.argv) - 1)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    return tmp_path


def test_scenarios_are_listed_with_what_they_measure(folder: Path) -> None:
    (folder / "nothing.py").write_text(SCRIPT)
    (folder / "_helper.py").write_text("")
    assert invoke("bench").out.split() == ["nothing", "Measures", "nothing."]


def test_scenario_gets_the_other_arguments_and_gives_the_exit_code(folder: Path) -> None:
    (folder / "nothing.py").write_text(SCRIPT)
    assert invoke("bench", "nothing", "--peers", "2").code == 2


def test_unknown_scenario_names_the_known(folder: Path) -> None:
    (folder / "nothing.py").write_text(SCRIPT)
    assert invoke("bench", "all").error == "no benchmark 'all'; there are nothing"


def test_outside_of_a_checkout_it_says_so(folder: Path) -> None:
    assert "run this from a source checkout" in invoke("bench").error
