"""`benchmarks/suite.py` on peers in this process, with a stand-in for another system."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmark_modules import load_benchmark
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules.testing import LocalSwarm
from remote_modules.testing.pace import Pace

SPANS = ["0:4", "4:8"]
STAND_IN = """
import json, sys
given = json.loads(sys.argv[1])
for line in sys.stdin:
    asked = json.loads(line)
    if asked["op"] == "open":
        answer = {"name": f"stand-in, {asked['peers']} peers, {asked['profile']}"}
    else:
        assert len(asked["prompt"]) == asked["prefix"]
        answer = {"prefill_seconds": 0.5, "seconds": 0.25 * asked["tokens"], **given}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def suite() -> Any:
    transformers_logging.disable_progress_bar()  # its monitor is a thread that stays
    return load_benchmark("suite")


@pytest.fixture(scope="module")
def folder(suite: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    suite.build_checkpoint(folder, 64)
    return folder


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def place(suite: Any, folder: Path) -> Iterator[Any]:
    with LocalSwarm(folder, spans=SPANS) as swarm:
        yield suite.Place(len(SPANS), {"trackers": swarm.trackers})


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("system") / "stand_in.py"
    path.write_text(STAND_IN, "utf-8")
    return path


def command(path: Path, given: object) -> str:
    return shlex.join([sys.executable, str(path), json.dumps(given)])


def new_suite(suite: Any, folder: Path, arms: Any, *scenarios: str) -> Any:
    short = {"decode": suite.Scenario(8, 4, "token_s"), "prefill": suite.Scenario(12, 1, "prefill_s")}
    chosen = {name: short[name] for name in scenarios}
    return suite.Suite(folder, arms, rounds=2, seed=0, scenarios=chosen)


def test_all_arms_are_measured_and_have_the_local_tokens(
    suite: Any, folder: Path, local: Any, place: Any, stand_in: Path, tmp_path: Path
) -> None:
    offloaded = suite.offloaded(LlamaForCausalLM.from_pretrained(folder).eval(), tmp_path / "offload")
    baselines = [suite.ModelArm("local", local), suite.StagesArm(folder, SPANS, local), offloaded]
    results = {
        "loopback": new_suite(suite, folder, baselines, "decode", "prefill").measure(
            "loopback", place, systems=[command(stand_in, {})]
        )
    }
    found = results["loopback"]
    names = ["local", "stages in one process", "accelerate disk offload", "remote", "stand-in, 2 peers, loopback"]
    for scenario in ("decode", "prefill"):
        rows = found[scenario]["arms"]
        assert [row["arm"] for row in rows] == names
        assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows)
        assert {row["ratio_to"] for row in rows} == {"local"}
        assert rows[0]["ratio"] == 1.0
    assert found["decode"]["arms"][-1]["median_s"] == 0.25
    assert found["prefill"]["arms"][-1]["median_s"] == 0.5
    hops = found["decode"]["waterfall"]
    assert [hop["hop"] for hop in hops] == [*SPANS, "client"]
    assert all(hop["compute"] > 0 and hop["wire"] >= 0 for hop in hops)
    text = suite.markdown(results)
    suite.keep(tmp_path, {"results": results}, text)
    assert json.loads((tmp_path / "suite.json").read_text("utf-8")) == {"results": results}
    assert "| loopback | decode | stand-in, 2 peers, loopback | 250.00 | 250.00 | 250.00 |" in text


def test_paced_arms_are_labelled_and_compared_with_paced_stages(
    suite: Any, folder: Path, local: Any, place: Any
) -> None:
    pace = Pace(0.0001)  # the peers of this process are not paced: only what is said of them is looked at
    baselines = [suite.ModelArm("local", local), suite.StagesArm(folder, SPANS, local, pace)]
    found = new_suite(suite, folder, baselines, "decode").measure("loopback", place, is_paced=True)
    ratios = {suite.label(row): row["ratio_to"] for row in found["decode"]["arms"]}
    stages = "stages in one process"
    assert ratios == {"local": "local", f"{stages} (paced)": stages, "remote (paced)": stages}


def test_other_tokens_end_the_run(suite: Any, folder: Path, local: Any, place: Any, stand_in: Path) -> None:
    arms = [suite.ModelArm("local", local)]
    wrong, whole = command(stand_in, {"output": [1, 2, 3, 4, 5]}), new_suite(suite, folder, arms, "decode")
    with pytest.raises(SystemExit, match=r"'stand-in.*' decoded \(1, 2, 3, 4, 5\), the first arm"):
        whole.measure("loopback", place, systems=[wrong])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seconds": "long"}, "must answer 'seconds', got 'long'"),
        ({"seconds": -1.0}, "must answer 'seconds', got -1.0"),
        ({"prefill_seconds": None}, "must answer 'prefill_seconds', got None"),
        ({"output": ["a"]}, "must answer ids as 'output'"),
        ({"error": "out of memory"}, "says: out of memory"),
        ({"output": [7] * 400_000}, "lines of at most 1048576 bytes"),
    ],
    ids=["no number", "negative", "missing", "no ids", "error", "long line"],
)
def test_system_that_answers_badly_is_refused(suite: Any, stand_in: Path, given: object, message: str) -> None:
    script = stand_in.parent / "bad.py"
    script.write_text(STAND_IN.replace("json.loads(sys.argv[1])", repr(given)), "utf-8")
    with (
        suite.OtherSystem(f"{sys.executable} {script}", {"peers": 1, "profile": "loopback"}) as system,
        pytest.raises(SystemExit, match=message),
    ):
        system.decode([1, 2], 4)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.stdin.readline(); print('hello')", "must answer a line of JSON, got b'hello'"),
        ("import sys; sys.stdin.readline(); print('[1]')", "must answer an object, got"),
        ("import sys; sys.stdin.readline(); print('{}')", "must answer a name after 'open', got None"),
        ("import sys; sys.stdin.readline()", "ended without an answer"),
        ("import sys; sys.stdin.read()", "did not answer within 0.2 s"),
    ],
    ids=["no JSON", "no object", "no name", "ended", "silent"],
)
def test_system_that_does_not_open_is_refused(suite: Any, code: str, message: str) -> None:
    patience_s = 0.2 if "within" in message else 30.0
    with pytest.raises(SystemExit, match=message):
        suite.OtherSystem(shlex.join([sys.executable, "-c", code]), {}, patience_s=patience_s)


def test_command_that_does_not_exist_is_refused(suite: Any) -> None:
    with pytest.raises(SystemExit, match="cannot start '/no/such/program'"):
        suite.OtherSystem("/no/such/program", {})


def test_rounds_are_interleaved_in_changing_order(suite: Any) -> None:
    order: list[str] = []

    def run(arm: Any) -> Any:
        order.append(arm.name)
        return arm.decode([], 1)

    class Arm:
        def __init__(self, name: str) -> None:
            self.name = name

        def decode(self, prompt: object, tokens: int) -> Any:
            return SimpleNamespace(tokens=(1,))

    arms = [Arm(name) for name in "abc"]
    samples = suite.interleave(arms, run, 6, suite.Random(1))
    rounds = ["".join(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert rounds[0] == "abc"  # warms up
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert [len(found) for found in samples.values()] == [6, 6, 6]


def test_ratio_is_the_median_of_each_rounds_ratio(suite: Any) -> None:
    assert suite.median_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == 2.0


def test_peers_hold_equal_shares(suite: Any) -> None:
    assert suite.equal_spans(1) == ["0:8"]
    assert suite.equal_spans(3) == ["0:3", "3:5", "5:8"]


def test_too_few_rounds_are_refused(suite: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.parse([]).rounds == 5
    with pytest.raises(SystemExit):
        suite.parse(["--rounds", "4"])
    assert "at least 5 rounds" in capsys.readouterr().err
