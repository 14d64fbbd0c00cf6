"""The examples run as they stand, as a reader would run them, and say what they promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT_S = 100


# What peft and Lightning warn of, and a reader can do nothing about.
OF_LIBRARIES = (
    "ignore::FutureWarning",
    "ignore:Checkpoint directory",
    "ignore:The 'train_dataloader' does not have many workers",
)


def run(name: str, *arguments: str) -> str:
    """What the example prints; warnings are errors there too."""
    options = [word for text in ("error", *OF_LIBRARIES) for word in ("-W", text)]
    done = subprocess.run(
        [sys.executable, *options, str(EXAMPLES / name), *arguments],
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


def test_train_prompt_learns_and_has_the_numbers_of_the_local_model() -> None:
    options = ("--steps", "4", "--validation", "8", "--rate", "0.03")
    remote = run("train_prompt.py", *options)
    found = re.findall(
        r"^(\w+ ?\w*), \d+ parameters: perplexity ([\d.]+) before, ([\d.]+) after$", remote, re.MULTILINE
    )
    assert [kind for kind, _, _ in found] == ["prompt", "deep prompt"]
    assert all(float(after) < float(before) for _, before, after in found)
    assert remote == run("train_prompt.py", *options, "--local")


def test_local_swarm_survives_a_killed_peer() -> None:
    output = run("local_swarm.py")
    assert re.search(r"^killing peer \w{6}, process \d+, which runs blocks 3:6$", output, re.MULTILINE)
    assert re.search(r"^failovers [1-9]\d*, tokens replayed [1-9]\d*, ", output, re.MULTILINE)
    assert output.endswith("identical to the local model: True\n")


def test_train_lora_learns_and_has_the_numbers_of_the_local_model() -> None:
    options = ("--steps", "12", "--validation", "16")
    remote = run("train_lora.py", *options, "--peers", "thread")
    numbers, expected = map(numbers_of, (remote, run("train_lora.py", *options, "--local")))
    assert len(numbers) == 3 + 2 + 2 + 1
    assert numbers == expected
    found = re.search(r"^validation perplexity: ([\d.]+) before, ([\d.]+) after", remote, re.MULTILINE)
    assert found is not None
    assert float(found[2]) < 0.9 * float(found[1])


def numbers_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"step|before|after|validation", line)]


def test_train_classifier_has_the_numbers_of_the_local_model() -> None:
    options = ("--steps", "6", "--test", "32")
    remote = run("train_classifier.py", *options)
    assert re.search(r"^accuracy on modules that were held out: [\d.]+% before, [\d.]+% after$", remote, re.MULTILINE)
    assert remote == run("train_classifier.py", *options, "--local")


def check_failover_in(output: str, num_logs: int) -> None:
    failovers = [int(count) for count in re.findall(r"^step \d+: loss [\d.]+, (\d+) failovers", output, re.MULTILINE)]
    assert len(failovers) == num_logs
    assert failovers[0] == 0
    assert sum(failovers) >= 1


KINDS = [(), ("--sft",)] if sys.version_info >= (3, 11) else [()]  # TRL needs that


@pytest.mark.parametrize("kind", KINDS, ids=["Trainer", "SFTTrainer"][: len(KINDS)])
def test_train_trainer_survives_a_killed_peer_and_saves_an_ordinary_adapter(kind: tuple[str, ...]) -> None:
    output = run("train_trainer.py", "--steps", "8", *kind)
    check_failover_in(output, num_logs=4)
    found = re.search(
        r"^held-out loss ([\d.]+), of the saved adapter on the local model ([\d.]+)$", output, re.MULTILINE
    )
    assert found is not None
    assert found[1] == found[2]


def test_train_lightning_resumes_and_survives_a_killed_peer() -> None:
    output = run("train_lightning.py", "--epochs", "2")
    check_failover_in(output, num_logs=10)
    assert re.findall(r"^step (\d+):", output, re.MULTILINE) == [str(step) for step in range(1, 11)]


if sys.version_info >= (3, 11):  # ipykernel needs that

    def test_notebook_runs() -> None:
        """In a kernel of its own, at a small size."""
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.read(EXAMPLES / "finetune.ipynb", as_version=4)
        sizes = next(cell for cell in notebook.cells if "NUM_STEPS = " in cell.source)
        sizes.source = re.sub(r"NUM_STEPS = \d+", "NUM_STEPS = 4", sizes.source)
        assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
        client = NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": str(EXAMPLES)}})
        client.execute()
        printed = "".join(
            output.text
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if output.output_type == "stream" and output.name == "stdout"
        )
        assert re.search(r"^perplexity [\d.]+ before$", printed, re.MULTILINE)
        assert re.search(r"^perplexity [\d.]+ after$", printed, re.MULTILINE)
        assert len(re.findall(r"^step \d+: loss [\d.]+$", printed, re.MULTILINE)) == 4
        assert re.search(r"^failovers [1-9]", printed, re.MULTILINE)
        assert "saved and local agree: True" in printed


def test_train_draft_model_writes_a_draft_that_knows_some_of_its_teacher(tmp_path: Path) -> None:
    corpus, draft = tmp_path / "corpus.txt", tmp_path / "draft"
    text = "The file is closed when the last reader is gone, and {0} is returned to the caller. " * 3
    corpus.write_text("\n".join(json.dumps(["test", text.format(number)]) for number in range(120)), encoding="utf-8")
    options = ("--steps", "12", "--context", "32", "--batch", "4", "--corpus", str(corpus))
    found = re.search(
        r"the same first choice ([\d.]+), overlap ([\d.]+)", run("train_draft_model.py", str(draft), *options)
    )
    assert found is not None
    assert min(float(found[1]), float(found[2])) > 0.3
    assert {"config.json", "tokenizer.json", "README.md"} <= {path.name for path in draft.iterdir()}
