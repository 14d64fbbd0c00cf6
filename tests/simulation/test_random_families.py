"""Stock generations of several architectures under random faults: side inputs, states that cannot go back, experts."""

from __future__ import annotations

import asyncio
import gc
from random import Random

import pytest
import torch

from remote_modules.testing.memory_network import CLIENT
from remote_modules.testing.simulation import SESSION_IDLE_S

from .faults import FAULTS, Weather
from .models import family_of, opened
from .test_kill_modes import MODES, ROUNDING, assert_close

CASES = [
    ("beam", "llama"),
    ("prompt-lookup", "llama"),
    ("greedy", "gemma3n_text"),  # side inputs: per-layer embeddings
    ("padded", "qwen3_next"),  # linear attention and experts
    ("greedy", "mamba2"),  # no cache of keys and values at all
    ("padded-beam", "mixtral"),
]
SEEDS = 5
LONGEST_S = 100.0
# A client that runs on the caller's thread cannot sleep, and meets a tracker before anything happens.
KINDS = sorted(set(FAULTS) - {"client sleeps"})


@pytest.mark.parametrize(("mode", "family"), CASES)
def test_random_faults_change_no_token(mode: str, family: str) -> None:
    run = MODES[mode][0]
    expected = run(family_of(family).local)
    begun = failovers = 0
    for seed in range(SEEDS):
        with opened(family) as stage:
            swarm, loop = stage.swarm.swarm, stage.swarm.io.loop
            weather = Weather(swarm, Random(seed), [CLIENT])
            run(stage.model)  # meets the peers
            blowing = loop.create_task(weather.blow(KINDS, most=8))
            found = run(stage.model)
            stage.swarm.io.run(asyncio.wait_for(blowing, LONGEST_S))
            stage.swarm.io.run(weather.clear())
            assert torch.equal(found[0], expected[0]), f"seed {seed} changed tokens; faults: {weather.begun}"
            assert_close(found, expected, max(1e-3, ROUNDING.get(family, 0.0)))
            assert swarm.violations == [], f"seed {seed}; faults: {weather.begun}"
            begun, failovers = begun + len(weather.begun), failovers + stage.stats.failovers
            del found
            gc.collect()
            stage.swarm.io.run(asyncio.sleep(SESSION_IDLE_S + 5.0))  # some could not be told
            assert [peer.kv_bytes for peer in swarm.peers] == [0] * len(swarm.peers), f"seed {seed}"
    assert begun >= SEEDS
    assert failovers >= 1
