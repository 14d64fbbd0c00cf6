"""Build the project's built-in language model: a 2.5-million-parameter llama for English prose.

Its text ships with Python (language reference, docstrings, comments, licence): no downloads. The
output is a Transformers checkpoint in several shards, with tokenizer, loss curves and model card.
"""

import ast
import json
import math
import random
import re
import shlex
import sys
import sysconfig
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE, MAX_POSITIONS, PAD, EOS = 2048, 1024, 0, 2
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
PROMPTS = ("The function returns a", "If the file does not exist, an exception")
SKIPPED_FOLDERS = re.compile(r"(^|/)(tests?|idlelib|lib2to3|\w+-packages|turtledemo|encodings|pydoc_data|ensurepip)/")
COMMON_WORD = re.compile(
    r"(?i)\W*(an?|and|are|as|at|be|been|but|by|can|does|for|from|ha[sd]|have|if|in|into|is|its?|may"
    r"|must|not?|of|on|one|only|or|should|so|the[mny]?|than|that|their|there|these|this|to|used|was"
    r"|using|we|when|where|which|will|with|you)\W*"
)
ASCII = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014", "\"\"''--")
REWRITES: tuple[tuple[str, str], ...] = (
    (r":(?:\w+:)+`[~!]?([^`]+)`", r"\1"),
    (r"``([^`]+?)(?:``|'')", r"\1"),
    (r"`([^`']+)[`']", r"\1"),
    (r"(?<![\w*])\*{1,2}([A-Za-z_][\w ,-]*?)\*{1,2}(?![\w*])", r"\1"),
    (r"\s*\[\d+\]_?", ""),
    (r"([\"'])[\"'](?=\w)|(?<=\w)[\"']([\"'])", r"\1\2"),
    (r"(?<=\w)-\s*\n\s*(?=\w)", "-"),
    (r"\s+", " "),
    (r"(?<=\w) --? (?=\w)", " - "),
    (r"( [a-z]+) ?$", r"\1."),
)
REJECTED = re.compile(
    r">>>|::=|\.\. |https?:|ftp:|www\.|@\w|Copyright|All Rights|XXX|TODO|FIXME|BUG|[{}|\\^~]"
    r"|==|--|^\S+ - |__\w+__.*__\w+__.*__\w+__|[^\x20-\x7e]|# | = |\.py\b.*\.py\b|^\w+\([^)]*\)[ :]"
)
CODE = re.compile(r"^[ \t]*(?:>>>|\.\. )|::[ \t]*$", re.MULTILINE)
WORD = re.compile(r"[(\"'\[]*[A-Za-z]+(?:['/-][A-Za-z]+)*[)\"'\].,;:!?]*")
BULLET = re.compile(r"^[ \t]*(?:[*+•-]|\(?\d{1,2}[.)]|\(?[a-z]\))[ \t]+", re.MULTILINE)
SVG_HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 380" font-size="12">
<rect width="640" height="380" fill="#fff"/><path d="M60 30V320H620" fill="none" stroke="#333"/>
<text x="340" y="366" text-anchor="middle">training step</text>
<text transform="rotate(-90 18 175)" x="18" y="175" text-anchor="middle">nats per token</text>"""
CARD = """# {output.name}

A llama of {parameters:,} parameters ({megabytes:.1f} MB in float32; {num_hidden_layers} layers of {hidden_size},
{vocab_size} byte-level BPE tokens) that continues English prose in the manner of Python's documentation, for tests
and demonstrations. It is no assistant. It was trained on {context} tokens at a time and needs no special token.

| source of the {tokens:,} tokens of text (code and repetitions left out) | documents | characters |
| --- | ---: | ---: |
{sources}

Licence: the text is part of Python's distribution, under the Python Software Foundation License
Version 2; some modules carry further permissive notices. It is not in this folder, though a model
like this can repeat sentences of it. The weights derived from it are released under this
project's MIT licence, as far as there are rights in them.

## Training

    {command}

AdamW at a peak rate of {rate}, weight decay {weight_decay}, dropout {dropout}, {batch} windows a step, {length} steps
on {processor} with PyTorch {torch}. Whole documents ({held_out:,} tokens) were held out. These are the weights
of step {best[0]}, with the lowest validation loss measured in runs of {lengths} steps: {best[2]:.3f} nats per token,
slightly optimistic for having been chosen, as the script's default settings were among seven.
Training loss, with dropout: {best[1]:.3f}. Greedy choice soon repeats itself on most prompts.

![loss curves](loss_curve.svg)

## Samples, up to 48 new tokens, line breaks left out

{samples}
"""
Document = tuple[str, str]  # Its source; its text, one line a paragraph, blank lines between.


@dataclass
class Run:
    """A training run: its losses as ``(step, train, validation)`` and its best weights."""

    length: int
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    best: tuple[int, float, float] = (0, math.inf, math.inf)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def reads_like_prose(paragraph: str) -> bool:
    """Whether a one-line paragraph is made of English sentences rather than code or tables."""
    words = paragraph.split()
    sentences = re.fullmatch(r"[\"'(]?[A-Z].*[.!?][\"')]*", paragraph)
    if len(words) < 8 or not sentences or REJECTED.search(paragraph):
        return False
    # The thresholds below were set by reading what falls on either side of them.
    plain = sum(bool(WORD.fullmatch(word)) for word in words) / len(words)
    common = sum(bool(COMMON_WORD.fullmatch(word)) for word in words) / len(words)
    capitals = sum(character.isupper() for character in paragraph) / len(paragraph)
    return plain >= 0.75 and common >= 0.17 and capitals < 0.125


def paragraphs(text: str) -> Iterator[str]:
    """The prose paragraphs of a text, unwrapped to one line each, list items standing alone."""
    for block in re.split(r"\n[ \t]*\n", BULLET.sub("\n", text)):
        paragraph = CODE.split(block, maxsplit=1)[0].translate(ASCII)
        for pattern, replacement in REWRITES:
            paragraph = re.sub(pattern, replacement, paragraph).strip()
        if paragraph.endswith(":"):
            # The example it announces is code and gets dropped, so the announcement goes too.
            paragraph = paragraph[: paragraph.rfind(". ") + 1]
        if re.match(r"[a-z]+ [a-z]+ ", paragraph):
            paragraph = paragraph[0].upper() + paragraph[1:]
        if reads_like_prose(paragraph):
            yield paragraph


def docstrings(source: str) -> list[str]:
    """The docstrings of a module's source, outermost first; none if it does not parse."""
    owners = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    try:
        nodes = ast.walk(ast.parse(source))
        return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, owners)]
    except SyntaxError:
        return []


def raw_texts() -> Iterator[tuple[str, Iterable[str]]]:
    """Each document of this installation as ``(source, texts)``, in a fixed order."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics  # Slim installs lack it.
    for _, text in sorted(topics.items()):
        yield "language reference (`pydoc_data.topics`)", [text]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not SKIPPED_FOLDERS.search(path.relative_to(library).as_posix()):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield "docstrings of the standard library", docstrings(text)
            blocks = re.findall(r"(?m)(?:^[ \t]*#.*\n)+", text)
            lines = [re.sub(r"(?m)^[ \t]*#+ ?", "", block) for block in blocks]
            yield "comments of the standard library", lines
    for path in sorted(library.glob("LICENSE*")):
        yield "licence (`LICENSE.txt`)", [path.read_text(encoding="utf-8")]


def build_corpus() -> list[Document]:
    """The prose of this installation: no paragraph twice, documents in a seeded random order."""
    seen: set[str] = set()
    documents = []
    for source, texts in raw_texts():
        found = {re.sub(r"[^a-z]+", " ", p.lower()): p for text in texts for p in paragraphs(text)}
        fresh = [paragraph for key, paragraph in found.items() if key not in seen]
        seen.update(found)
        if fresh:
            documents.append((f"{source}, Python {sys.version.split()[0]}", "\n\n".join(fresh)))
    random.Random(20).shuffle(documents)
    return documents


def load_corpus(path: Path) -> list[Document]:
    """The documents of a file of JSON lines; without the file they are built and written there."""
    if not path.exists():
        path.write_text("\n".join(map(json.dumps, build_corpus())), encoding="utf-8")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(source, text) for source, text in map(json.loads, lines)]


def split(documents: Sequence[Document]) -> tuple[list[str], list[str]]:
    """The training texts and the held-out ones: whole documents, 2 % of the text at most."""
    room = sum(len(text) for _, text in documents) // 50
    training, held_out = list[str](), list[str]()
    for _, text in documents:
        part = held_out if len(text) <= room else training
        part.append(text)
        room -= len(text) if part is held_out else 0
    return training, held_out


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``VOCAB_SIZE`` entries; it adds no special tokens itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    wrap: Any = PreTrainedTokenizerFast  # Its constructor is not annotated.
    wrapped: PreTrainedTokenizerFast = wrap(tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, **SPECIAL)
    return wrapped


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> torch.Tensor:
    """The texts as one row of token ids, an end-of-text token after each."""
    encode = tokenizer.backend_tokenizer.encode  # The wrapper warns of texts beyond its maximum.
    return torch.tensor([i for text in texts for i in (*encode(text).ids, EOS)])


def make_model(seed: int) -> LlamaForCausalLM:
    """The untrained model; one seed always gives the same weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=8,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


class Trainer:
    """Trains fresh models on random windows of one token stream, one run after another."""

    def __init__(self, training: torch.Tensor, held_out: torch.Tensor, options: Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.windows = training.to(self.device).unfold(0, options.context, 1)
        self.held_out = held_out.to(self.device).unfold(0, options.context, options.context)
        self.autocast = torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda")

    def drop(self, _: torch.nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        """A forward hook: dropout of what a module adds to the residual stream, in training."""
        return torch.nn.functional.dropout(output, self.options.dropout, torch.is_grad_enabled())

    def train(self, length: int) -> Iterator[tuple[LlamaForCausalLM, torch.Tensor]]:
        """Train a fresh model, yielding it and the batch's loss after each of ``length`` steps."""
        model = make_model(self.options.seed)
        torch.nn.Module.to(model, self.device)  # The class's own ``to`` has a faulty annotation.
        for name, module in model.named_modules():
            if name.endswith(("embed_tokens", "o_proj", "down_proj")):
                module.register_forward_hook(self.drop)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
        optimizer.param_groups[0]["weight_decay"] = self.options.weight_decay
        dice = torch.Generator().manual_seed(self.options.seed)
        for step in range(length):
            warm_up = (step + 1) / min(100, length // 10 + 1)
            cosine = 0.51 + 0.49 * math.cos(math.pi * step / length)
            optimizer.param_groups[0]["lr"] = self.options.rate * min(warm_up, cosine)
            starts = torch.randint(len(self.windows), (self.options.batch,), generator=dice)
            batch = self.windows[starts.to(self.device)]
            with self.autocast:
                loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield model, loss.detach()

    def run(self, length: int) -> Run:
        """Train one model for ``length`` steps, keeping the weights of least validation loss."""
        run, recent = Run(length), list[torch.Tensor]()
        for step, (model, loss) in enumerate(self.train(length), start=1):
            recent.append(loss)
            if step % self.options.report_every and step != length:
                continue
            mean = float(torch.stack(recent).mean())
            recent.clear()
            with torch.no_grad(), self.autocast:
                held_out = model(input_ids=self.held_out, labels=self.held_out).loss.item()
            run.losses.append((step, mean, held_out))
            print(f"step {step:5d}  train {mean:.3f}  validation {held_out:.3f}", flush=True)
            if held_out < run.best[2]:
                run.best = run.losses[-1]
                run.weights = {k: v.cpu().clone() for k, v in model.state_dict().items()}
        return run


def write_svg(path: Path, run: Run) -> None:
    """Draw the run's two loss curves with axes, ticks and a legend."""
    flat = [loss for _, *pair in run.losses for loss in pair]
    top, bottom = math.floor(max(flat)) + 1, math.floor(min(flat))
    x, y = 560 / run.length, 290 / (top - bottom)
    parts = [SVG_HEAD]
    for loss in range(bottom, top + 1):
        height = 320 - y * (loss - bottom)
        parts.append(f'<path d="M60 {height:.1f}H620" stroke="#ddd"/>')
        parts.append(f'<text x="52" y="{height + 4:.1f}" text-anchor="end">{loss}</text>')
    for step in (run.length * tick // 4 for tick in range(5)):
        parts.append(f'<path d="M{60 + x * step:.1f} 320v5" stroke="#333"/>')
        parts.append(f'<text x="{60 + x * step:.1f}" y="340" text-anchor="middle">{step}</text>')
    for column, name, colour in ((1, "training", "#1f77b4"), (2, "validation", "#d62728")):
        points = " ".join(f"{x * r[0]:.1f},{y * (bottom - r[column]):.1f}" for r in run.losses)
        line, height = f'fill="none" stroke="{colour}" stroke-width="1.5"', 26 + 18 * column
        parts.append(f'<polyline transform="translate(60 320)" points="{points}" {line}/>')
        parts.append(f'<path d="M500 {height}h24" {line}/>')
        parts.append(f'<text x="530" y="{height + 4}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>\n"]), encoding="utf-8")


def samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """What the model makes of each prompt, as a Markdown list."""
    lines = []
    for prompt, heat in product(PROMPTS, (None, 0.7)):
        torch.manual_seed(0)
        ids = torch.tensor([tokenizer.encode(prompt)])
        choice: Any = {"temperature": heat, "do_sample": True} if heat else {}
        output = model.generate(ids, max_new_tokens=48, attention_mask=ids.ge(0), **choice)
        text = " ".join(str(tokenizer.decode(output[0], skip_special_tokens=True)).split())
        lines.append(f"* {f'temperature {heat}' if heat else 'greedy'}: {text}")
    return "\n".join(lines)


def source_table(documents: Sequence[Document]) -> str:
    """The rows of a Markdown table: source, number of documents, characters."""
    sizes: dict[str, list[int]] = {}
    for source, text in documents:
        sizes.setdefault(source, []).append(len(text))
    return "\n".join(f"| {name} | {len(n)} | {sum(n):,} |" for name, n in sorted(sizes.items()))


def write_model(run: Run, tokenizer: PreTrainedTokenizerFast, options: Namespace, **facts: object) -> str:
    """Write the checkpoint, curves and model card of a run; return the card's samples."""
    output, model = Path(options.output), make_model(options.seed)
    model.load_state_dict(run.weights)
    model.save_pretrained(output, max_shard_size="2300KB")
    tokenizer.save_pretrained(output)
    rows = [f"{step},{train:.4f},{held_out:.4f}\n" for step, train, held_out in run.losses]
    (output / "loss_curve.csv").write_text("step,train_loss,validation_loss\n" + "".join(rows))
    write_svg(output / "loss_curve.svg", run)
    facts |= model.config.to_dict() | vars(options) | vars(run)
    facts |= {
        "parameters": model.num_parameters(),
        "megabytes": sum(shard.stat().st_size for shard in output.glob("*.safetensors")) / 1e6,
        "command": shlex.join(["python", *sys.argv]),
        "processor": torch.cuda.get_device_name() if options.device == "cuda" else "a CPU",
        "torch": torch.__version__,
        "samples": samples(model, tokenizer),
    }
    (output / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    return str(facts["samples"])


def parse_options() -> Namespace:
    """The command line; ``device`` comes back as cpu or cuda."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, nargs="+", default=[2000], help="run lengths; the best run is kept")
    add("--minutes", type=float, default=math.inf, help="shorten the runs to fit into this")
    add("--corpus", type=Path, default=Path(".corpus.txt"), help="read; if missing, built")
    add("--output", type=Path, default=Path("remote_modules/assets/pydoc-2m"))
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch", type=int, default=16, help="windows a step")
    add("--context", type=int, default=512, help="tokens a window")
    add("--rate", type=float, default=4e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.5)
    add("--dropout", type=float, default=0.2)
    add("--report-every", type=int, default=20, help="steps between validations")
    add("--seed", type=int, default=20)
    options = parser.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main() -> None:
    """Build or read the corpus, train, and write the model folder."""
    options, started = parse_options(), time.perf_counter()
    documents = load_corpus(options.corpus)
    training, held_out = split(documents)
    tokenizer = train_tokenizer(training)
    streams = token_stream(tokenizer, training), token_stream(tokenizer, held_out)
    trainer = Trainer(*streams, options)
    tokens, size = sum(map(len, streams)), sum(len(text) for _, text in documents)
    print(f"{size / 1e6:.2f} MB, {tokens} tokens, {len(held_out)} documents held out")
    lengths: list[int] = options.steps
    if options.minutes < math.inf:
        # Steps of a throw-away model; asking for the loss waits for the GPU.
        times = [time.perf_counter() for _, loss in trainer.train(8) if loss.item()]
        per_step = (times[-1] - times[3]) / 4
        # A seventh is left for the validations and the start of each run.
        left = (60 * options.minutes - (time.perf_counter() - started)) * 6 / 7
        factor = min(1.0, max(left, 0.0) / (per_step * sum(lengths)))
        lengths = [max(1, int(length * factor)) for length in lengths]
        print(f"{1000 * per_step:.1f} ms a step: runs of {lengths} steps")
    best = min(map(trainer.run, lengths), key=lambda run: run.best[2])
    facts = {"tokens": tokens, "held_out": len(streams[1]), "lengths": str(lengths).strip("[]")}
    print(write_model(best, tokenizer, options, sources=source_table(documents), **facts))


if __name__ == "__main__":
    main()
