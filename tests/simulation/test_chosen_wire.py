"""``wire="auto"``: what was measured decides, once for each session and pass, and lost peers change nothing of it."""

from __future__ import annotations

from typing import Any

import pytest

from remote_modules.client.wire_choice import coding_for

from .models import HOP_S, Kill, Stage, opened
from .test_int8_wire import NUM_PASSES, trained
from .test_kill_modes import COMPUTING_S, KILLS, MODES, assert_equal, check_loss

FAST, SLOW = 1e9, 1e5  # bytes a second


def measured(stage: Stage, bytes_per_s: float) -> None:
    """As if large requests to all peers had gone so fast, and go on to."""
    measurements: Any = stage.layers._handle.swarm.router.measurements
    measurements.bandwidth_bytes_per_s = lambda peer_id, *, now_s: bytes_per_s


def run_of(stage: Stage, mode: str) -> Any:
    return trained(stage.model) if mode == "training" else MODES[mode][0](stage.model)


@pytest.mark.parametrize("mode", ["training", "greedy", "beam", "two-turns"])
@pytest.mark.parametrize(("bytes_per_s", "wire"), [(FAST, "compute"), (SLOW, "int8")])
def test_chosen_form_gives_what_the_setting_gives(mode: str, bytes_per_s: float, wire: str) -> None:
    results = []
    for setting in (wire, "auto"):
        with opened("llama", wire=setting, exact_replay=True) as stage:
            measured(stage, bytes_per_s)
            results.append(run_of(stage, mode))
            assert stage.stats.wire == ("" if setting == wire else wire)
    assert_equal(*results)


@pytest.mark.parametrize(
    ("mode", "kill"),
    [
        ("training", Kill(hop=0, call=1, moment_s=COMPUTING_S)),
        ("training", Kill(hop=0, call=1, moment_s=2 * HOP_S + COMPUTING_S)),  # in the backward
        ("greedy", KILLS["last-hop-computing"]),
        ("greedy", KILLS["spare-too"]),
    ],
)
def test_form_stays_though_links_change_and_peers_are_lost(
    mode: str, kill: Kill, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("llama", wire="int8", exact_replay=True) as stage:
        measured(stage, SLOW)
        expected = run_of(stage, mode)
    chosen: list[str] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        coding = coding_for(*args, **kwargs)
        chosen.append(coding.wire)
        return coding

    for user in ("session", "passes"):
        monkeypatch.setattr(f"remote_modules.client.{user}.coding_for", noted)
    with opened("llama", wire="auto", exact_replay=True) as stage:
        measured(stage, SLOW)
        handle = stage.model.get_input_embeddings().register_forward_hook(
            lambda *_: measured(stage, FAST) if chosen and mode == "greedy" else None
        )
        with stage.killing(kill):
            found = run_of(stage, mode)
        handle.remove()
        if mode == "training":  # nothing is replayed
            assert stage.stats.failovers >= len(stage.lost) == 1
        else:
            check_loss(stage, kill)
    assert chosen == ["int8"] * (NUM_PASSES if mode == "training" else 1)
    assert_equal(found, expected)
