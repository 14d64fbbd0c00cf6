from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=1000, help="first seed of the random simulations")
    parser.addoption("--seeds", type=int, default=100, help="how many seeds each test of the random simulations runs")


@pytest.fixture
def first_seed(request: pytest.FixtureRequest) -> int:
    seed: int = request.config.getoption("--seed")
    return seed


@pytest.fixture
def num_seeds(request: pytest.FixtureRequest) -> int:
    count: int = request.config.getoption("--seeds")
    return count
