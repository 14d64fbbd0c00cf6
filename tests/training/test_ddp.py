"""DDP with two clients of one swarm: both ranks have the losses of local blocks, though a peer is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from remote_modules.testing import LocalSwarm

from . import ddp_rank
from .loops import PeerKill

PROGRAM = Path(__file__).with_name("ddp_rank.py")
DEADLINE_S = 100.0


def test_two_ranks_have_the_local_losses(swarm: LocalSwarm, kill: PeerKill, tmp_path: Path) -> None:
    pids = {peer.peer_id: peer.pid for peer in swarm.peers}
    job = {"store": str(tmp_path / "store"), "checkpoint": swarm.checkpoint, "trackers": swarm.trackers, "pids": pids}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(job | {"rank": rank})],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    dead = [peer for peer in swarm.peers if peer.wait(0.0) == -signal.SIGKILL]
    assert len(dead) == 1
    kill.peer = dead[0]  # to be started again
    results = [json.loads(output) for output in outputs]
    assert results[0]["failovers"] >= 1
    for result in results:
        assert len(result["local"]) == ddp_rank.NUM_STEPS
        assert result["remote"] == result["local"]
    assert results[0]["local"] != results[1]["local"], "each rank has rows of its own"
