"""Loops of others through a swarm that loses a peer: the losses of all steps are the local ones to the last bit."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from remote_modules.testing import LocalSwarm

from . import loops
from .loops import Loop, PeerKill, assert_equal, train_local, train_remote

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),  # of Python 3.12, for data loaders
]

CASES: dict[str, Loop] = {
    "plain": loops.plain,
    "accelerate": loops.accelerated,
    "Trainer": loops.trainer_of_transformers,
    "Trainer-checkpointing": partial(loops.trainer_of_transformers, gradient_checkpointing=True),
    "Trainer-workers": partial(loops.trainer_of_transformers, dataloader_num_workers=2),
}
if sys.version_info >= (3, 11):  # TRL needs that
    CASES["SFTTrainer"] = partial(loops.supervised, gradient_checkpointing=False)
    CASES["SFTTrainer-checkpointing"] = partial(loops.supervised, gradient_checkpointing=True)


@pytest.mark.parametrize("loop", CASES.values(), ids=CASES)
def test_losses_are_the_local_ones(loop: Loop, swarm: LocalSwarm, kill: PeerKill, tmp_path: Path) -> None:
    assert_equal(train_remote(loop, swarm, kill, tmp_path), train_local(loop, swarm.checkpoint, tmp_path))
