"""The examples run as they stand, as a reader would run them, and say what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT_S = 100


def run(name: str, *arguments: str) -> str:
    """What the example prints; warnings are errors there too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate_streams_text_over_three_peers() -> None:
    output = run("generate.py", "--prompt", "The function returns a", "--tokens", "12")
    assert output.startswith("The function returns a list of the ")
    assert re.search(r"^12 passes over 0:3 \w{6} => 3:6 \w{6} => 6:8 \w{6}$", output, re.MULTILINE)


def test_train_prompt_has_the_losses_of_the_local_model() -> None:
    steps = re.findall(r"loss ([\d.]+), local [\d.]+, difference ([\d.e+-]+)", run("train_prompt.py", "--steps", "3"))
    assert len(steps) == 3
    assert all(float(difference) < 1e-4 for _, difference in steps)
    assert float(steps[-1][0]) < float(steps[0][0])


def test_local_swarm_survives_a_killed_peer() -> None:
    output = run("local_swarm.py")
    assert re.search(r"^killing peer \w{6}, process \d+, which runs blocks 3:6$", output, re.MULTILINE)
    assert re.search(r"^failovers [1-9]\d*, tokens replayed [1-9]\d*, ", output, re.MULTILINE)
    assert output.endswith("identical to the local model: True\n")
