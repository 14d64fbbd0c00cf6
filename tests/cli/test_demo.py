from __future__ import annotations

import json
import subprocess
import sys

from .program import TIMEOUT_S


def test_demo_survives_its_killed_peer_and_agrees_with_the_local_model() -> None:
    command = [sys.executable, "-m", "remote_modules", "demo", "--json", "--max-new-tokens", "12", "--train-steps", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=2 * TIMEOUT_S, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    value = json.loads(line)
    assert value["identical"]
    assert value["text"] == value["reference_text"]
    assert value["failovers"] == 1
    assert value["replayed_tokens"] > 0
    assert 0 < value["stall_seconds"] < 5
    assert [hop.split()[0] for hop in value["route_before"]] == ["0:3", "3:6", "6:8"]
    assert value["killed"] == value["route_before"][1]
    assert value["killed"] not in value["route_after"]
    assert value["losses_agree"]
    assert len(value["train_losses"]) == len(value["train_losses_local"]) == 2
    assert value["train_losses"][1] < value["train_losses"][0]
    assert value["seconds_total"] > 0
