"""Licence texts found on this machine, cut into documents for training and documents for validation.

They come from ``/usr/share/common-licenses``, where there is one (Debian), and from the licence files of the installed
Python packages. Licences copy from each other, so three things keep the validation honest: a paragraph that was seen
before is dropped, whole documents go to one side or the other, and a paragraph for training that shares any run of
eight words with the validation texts is dropped, too. Python's own licence is left out: the built-in model was trained
on it.
"""

import hashlib
import re
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

SYSTEM_FOLDER = Path("/usr/share/common-licenses")
FILE_NAME = re.compile(r"(?i)^(licen[cs]e|copying|notice)")
PYTHONS_OWN = re.compile(r"(?i)Python Software Foundation|\bPSF\b")
ASCII = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014", "\"\"''--")
MIN_WORDS = 8  # of a paragraph
MIN_CHARACTERS = 400  # of a document
RUN = 8  # words
VALIDATION_SHARE = 5  # one document in this many


class Texts(NamedTuple):
    """Documents, one line a paragraph."""

    training: list[str]
    validation: list[str]


def licence_texts() -> Texts:
    """The texts of this machine; which document goes where is decided by the digest of its text alone.

    Raises:
        RuntimeError: there are too few to split.
    """
    seen: set[str] = set()
    documents = []
    for text in sorted(set(_raw_texts()), key=lambda text: (-len(text), text)):  # long ones own what they share
        paragraphs = [line for line in _paragraphs(text) if line.lower() not in seen]
        seen.update(line.lower() for line in paragraphs)
        if sum(map(len, paragraphs)) >= MIN_CHARACTERS:
            documents.append(paragraphs)
    documents.sort(key=lambda lines: hashlib.sha256("\n".join(lines).encode()).digest())
    validation, training = documents[::VALIDATION_SHARE], []
    held_out = {run for lines in validation for line in lines for run in _runs(line)}
    for number, lines in enumerate(documents):
        kept = [line for line in lines if held_out.isdisjoint(_runs(line))]
        if number % VALIDATION_SHARE and sum(map(len, kept)) >= MIN_CHARACTERS:
            training.append("\n".join(kept))
    if not training:
        raise RuntimeError(
            f"found {len(documents)} different licence texts on this machine, expected some for training"
        )
    return Texts(training, ["\n".join(lines) for lines in validation])


def windows(tokenizer: PreTrainedTokenizerBase, documents: list[str], num_tokens: int) -> torch.Tensor:
    """Token ids ``[N, T]`` of the documents, one after another; a rest shorter than ``num_tokens`` is left out."""
    end = tokenizer.eos_token_id
    ids = [number for text in documents for number in (*tokenizer(text)["input_ids"], end)]
    count = len(ids) // num_tokens
    return torch.tensor(ids[: count * num_tokens]).view(count, num_tokens)


def _raw_texts() -> Iterator[str]:
    paths = {path.resolve() for path in SYSTEM_FOLDER.glob("*")}
    for root in {Path(str(package.locate_file(""))) for package in distributions()}:
        paths |= {path.resolve() for path in root.glob("*.dist-info/**/*") if FILE_NAME.match(path.name)}
    for path in sorted(paths):
        if path.is_file() and path.suffix not in (".py", ".json"):
            text = path.read_text("utf-8", errors="replace").translate(ASCII)
            if not PYTHONS_OWN.search(text):
                yield text


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n[ \t#*]*\n", text):
        line = " ".join(word for word in block.split() if word not in ("#", "*"))
        if len(line.split()) >= MIN_WORDS and line.isascii():
            yield line


def _runs(line: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", line.lower())
    return {tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}
