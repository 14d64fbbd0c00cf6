"""A classifier through a swarm: which library does a paragraph of documentation belong to?

    python examples/train_classifier.py [--steps N] [--local]

The texts are the docstrings of four libraries that are installed wherever this runs, the label is the library, and
modules, not paragraphs, are split into those to train on and those to test on. The names of the libraries are blanked
out. The head is new and lives here, as do the LoRA adapters inside the remote blocks (peft's ``SEQ_CLS``). ``--local``
does the same on the whole model in this process, and prints the same numbers.
"""

import argparse
import ast
import contextlib
import hashlib
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from remote_modules import ClientConfig, load
from remote_modules.model.checkpoint import built_in_path
from remote_modules.testing import LocalSwarm

ALONE = ClientConfig(peer_cache=None)  # no peers of other swarms that this machine remembers
LIBRARIES = ("torch", "transformers", "sympy", "networkx")  # all of them come with remote-modules
MODULES = 40  # of each library
PARAGRAPHS = 8  # of each module, at most
MIN_WORDS = 12
MAX_TOKENS = 48
BATCH = 16
NAMES = re.compile(r"(?i)(py)?torch|transformers?|hugging ?face|sympy|networkx|\bnx\b")
Rows = tuple[list[str], torch.Tensor]


def docstrings(library: str) -> list[list[str]]:
    """Paragraphs of prose of some modules of ``library``, chosen by the digest of their names."""
    spec = find_spec(library)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    paths = sorted(root.rglob("*.py"), key=lambda path: hashlib.sha256(str(path.relative_to(root)).encode()).digest())
    modules: list[list[str]] = []
    for path in paths:
        if "test" in str(path.relative_to(root)) or path.stat().st_size > 200_000:
            continue
        tree = ast.parse(path.read_text("utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        blocks = [" ".join(block.split()) for text in texts for block in re.split(r"\n\s*\n", text)]
        prose = [
            block for block in blocks if block.isascii() and len(block.split()) >= MIN_WORDS and ">>>" not in block
        ]
        if prose:
            modules.append([NAMES.sub("it", block) for block in dict.fromkeys(prose)][:PARAGRAPHS])
        if len(modules) == MODULES:
            break
    return modules


def split() -> tuple[Rows, Rows]:
    """Texts and labels for training and for the test; each fourth module is for the test, and no text is in both."""
    texts: tuple[list[str], list[str]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    seen: set[str] = set()
    for label, library in enumerate(LIBRARIES):
        for number, module in enumerate(docstrings(library)):
            side = 1 if number % 4 == 0 else 0
            fresh = [text for text in module if text not in seen]
            seen.update(fresh)
            texts[side].extend(fresh)
            labels[side].extend([label] * len(fresh))
    return (texts[0], torch.tensor(labels[0])), (texts[1], torch.tensor(labels[1]))


@contextlib.contextmanager
def model_of(is_local: bool) -> Iterator[Any]:
    """The built-in model with a head of one output for each library; its blocks are here or on two peers."""
    options: dict[str, Any] = {"num_labels": len(LIBRARIES)}
    if is_local:
        yield AutoModelForSequenceClassification.from_pretrained(built_in_path(), **options)
        return
    with LocalSwarm(built_in_path(), spans=["0:4", "4:8"], num_threads=1) as swarm:
        kind = AutoModelForSequenceClassification
        model: Any = load(
            built_in_path(), auto_class=kind, trackers=swarm.trackers, mdns=False, config=ALONE, **options
        )
        yield model
        model.model.layers.close()


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Any:
    return tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=MAX_TOKENS)


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> float:
    model.eval()
    texts, labels = rows
    starts = range(0, len(texts), BATCH)
    found = [model(**encode(tokenizer, texts[i : i + BATCH]), use_cache=False).logits.argmax(1) for i in starts]
    return float((torch.cat(found) == labels).float().mean())


def train(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Rows, num_steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=num_steps)
    texts, labels = rows
    order = torch.Generator().manual_seed(0)
    for step in range(1, num_steps + 1):
        chosen = torch.randint(len(texts), (BATCH,), generator=order)
        loss = model(**encode(tokenizer, [texts[i] for i in chosen.tolist()]), labels=labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step in (1, num_steps):
            print(f"step {step}: loss {loss.item():.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="a classifier through a swarm, on docstrings")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--test", type=int, default=240, help="paragraphs for the accuracy")
    parser.add_argument("--local", action="store_true", help="all blocks in this process")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as at the peers: numbers are equal to the last bit
    tokenizer = AutoTokenizer.from_pretrained(built_in_path())
    training, (texts, labels) = split()
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[: options.test]
    test = ([texts[i] for i in chosen.tolist()], labels[chosen])
    commonest = test[1].bincount().max().item() / len(test[1])
    print(f"{len(training[0])} paragraphs to train on, {len(test[0])} to test on, the commonest label {commonest:.1%}")
    with model_of(options.local) as model:
        torch.manual_seed(0)
        model.score.reset_parameters()  # new here and in a local model, and of equal values
        lora = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["q_proj", "v_proj", "down_proj"])
        adapted = get_peft_model(model, lora)
        before = accuracy(adapted, tokenizer, test)
        train(adapted, tokenizer, training, options.steps)
        after = accuracy(adapted, tokenizer, test)
    print(f"accuracy on modules that were held out: {before:.1%} before, {after:.1%} after")


if __name__ == "__main__":
    main()
