"""The supported range of transformers is stated in several places: they say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def found(name: str, pattern: str) -> list[str]:
    matches = re.findall(pattern, (ROOT / name).read_text("utf-8"), re.MULTILINE)
    assert matches, f"{name} has nothing like {pattern}"
    return matches


def number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


def test_oldest_release_is_one_in_all_places() -> None:
    (oldest,) = found("pyproject.toml", r'^    "transformers>=(5\.\d+),<6",$')
    assert found("constraints-oldest.txt", r"^transformers==(\S+)$") == [f"{oldest}.0"]
    assert found("README.md", r"transformers (5\.\d+) or later") == [oldest]
    assert found("README.md", r"\(tested with (5\.\d+) and 5\.\d+\)") == [oldest]
    assert found("CHANGELOG.md", r"transformers (5\.\d+) to 5\.\d+, the oldest and the newest in each") == [oldest]


def test_newest_release_is_one_in_all_places() -> None:
    newest = max(found("constraints.txt", r"^transformers==(5\.\d+)\."), key=number)
    assert found("README.md", r"\(tested with 5\.\d+ and (5\.\d+)\)") == [newest]
    assert found("CHANGELOG.md", r"transformers 5\.\d+ to (5\.\d+), the oldest and the newest in each") == [newest]


@pytest.mark.parametrize("package", ["transformers", "huggingface_hub"])
def test_oldest_pin_is_the_lower_bound_of_the_package(package: str) -> None:
    (bound,) = found("pyproject.toml", rf'^    "{package}>=([\d.]+)')
    (pin,) = found("constraints-oldest.txt", rf"^{package}==(\S+)$")
    assert number(pin)[: len(number(bound))] == number(bound)
