"""LoRA through a swarm whose peers are killed, against the same steps on the local model.

    python benchmarks/finetune.py [--quick] [--steps 200] [--seed 0] [--only kills bfloat16 clients]

Six processes hold the built-in model as 0:3, 3:6, 6:8, twice; peft's LoRA on five of seven projections of each block,
AdamW, windows of this project's documentation.

* kills: one peer of each span gets SIGKILL at a random step, while a request of the client is under way there: two in
  backward, one in forward or backward. The losses of all steps and the final adapter must be the local ones.
* bfloat16: gradients of the adapter at several steps, of peers that compute in bfloat16, a peer killed in backward.
* clients: two train different adapters at once on the same peers; each must have the curve of its run alone.

Everything is placed by seed; a kill that comes after the answer is not counted, and tried again at a later request.
Seconds are in the output; --quick has 20 steps and one kill in backward. Prints one line of JSON;
markdown and progress go to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _lora import Curve, Task, adapted, adapter_difference, relative, token_ids, train
from _report import Bar, print_report, say, table
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from remote_modules import load
from remote_modules.errors import PeerError
from remote_modules.model.checkpoint import built_in_path
from remote_modules.net.client_connection import ClientConnection, Reply
from remote_modules.spans import Span
from remote_modules.testing import LocalSwarm
from remote_modules.wire import messages

SPANS = ("0:3", "3:6", "6:8")
PARTS = ("kills", "bfloat16", "clients")
REST_S = 1.5  # bans run out, and restarted peers are announced again
MAX_LOSS_DIFFERENCE = 1e-4
MAX_ADAPTER_DIFFERENCE = 1e-5
MAX_BF16_DIFFERENCE = 1e-2


# kills


@dataclass(frozen=True, slots=True)
class Fault:
    """A peer is lost while it works on a request ``kind`` of ``span`` in step ``step`` or soon after.

    Attributes:
        moment: share of the time that such a request takes, after which it is lost.
    """

    step: int
    kind: str
    span: Span
    moment: float


@dataclass(slots=True)
class Hit:
    """A peer that was lost.

    Attributes:
        after_s: since the request was sent.
        error: of that very request, which had no answer then.
    """

    fault: Fault
    step: int
    after_s: float
    error: str = ""


@dataclass(slots=True)
class Killer:
    """Watches a client's requests, and kills their peers while they are under way."""

    swarm: LocalSwarm
    due: list[Fault]
    step: int = 0
    hits: list[Hit] = field(default_factory=list)
    lost: list[Any] = field(default_factory=list)
    _took_s: dict[str, float] = field(default_factory=dict)

    def inside(self, kind: str) -> int:
        """Kills by which a request of that kind came to nothing."""
        return sum(hit.fault.kind == kind and hit.error != "" for hit in self.hits)

    @contextmanager
    def watching(self) -> Iterator[None]:
        request = ClientConnection.request

        async def watched(connection: ClientConnection, message: Any, body: Any, *, timeout_s: float) -> Reply:
            return await self._watch(connection, message, request(connection, message, body, timeout_s=timeout_s))

        with patch.object(ClientConnection, "request", watched):
            yield

    async def _watch(self, connection: ClientConnection, message: messages.AnyRequest, answer: Any) -> Reply:
        kind, began_s = messages.kind_of(message), time.perf_counter()
        fault = self._due(kind, message)
        if fault is None:
            reply: Reply = await answer
            self._took_s[kind] = min(time.perf_counter() - began_s, self._took_s.get(kind, float("inf")))
            return reply
        self.due.remove(fault)
        hit = Hit(fault, self.step, 0.0)
        timer = asyncio.get_running_loop().call_later(fault.moment * self._took_s[kind], self._kill, connection, hit)
        sent_s = time.perf_counter()
        try:
            reply = await answer
        except PeerError as exc:
            hit.error = type(exc).__name__
            raise
        finally:
            timer.cancel()
            if hit in self.hits:
                hit.after_s -= sent_s
            else:
                self.due.append(replace(fault, moment=fault.moment / 2))
        return reply

    def _due(self, kind: str, message: messages.AnyRequest) -> Fault | None:
        if kind not in self._took_s or isinstance(message, messages.AdapterRequest):
            return None
        fits = [f for f in self.due if f.kind == kind and self.step >= f.step and f.span.start == message.start]
        return fits[0] if fits else None

    def _kill(self, connection: ClientConnection, hit: Hit) -> None:
        peer = next(peer for peer in self.swarm.peers if peer.peer_id == connection.peer_id)
        hit.after_s = time.perf_counter()
        self.hits.append(hit)
        self.lost.append(peer)
        peer.kill()
        say(f"  step {hit.step}: killed the peer of {hit.fault.span} inside its {hit.fault.kind}")


def place(seed: int, steps: int, kinds: Sequence[str]) -> list[Fault]:
    """A fault of each kind given, in spans that differ and at steps that do; none at first, so that peers are met."""
    rng = Random(seed)
    spans = rng.sample([Span.parse(span) for span in SPANS], len(kinds))
    at = rng.sample(range(2, max(3 + len(kinds), steps * 9 // 10)), len(kinds))
    return [Fault(*place, rng.uniform(0.0, 0.8)) for place in zip(at, kinds, spans, strict=True)]


# the parts


class Bench:
    """A swarm, the text, and the results so far."""

    def __init__(self, task: Task, num_kills: int, *, mode: Any = "process") -> None:
        self.ids = token_ids()
        self.bars: list[Bar] = []
        self.rows: list[tuple[str, ...]] = []
        self.result: dict[str, Any] = {"steps": task.steps, "rows": task.rows, "tokens": task.num_tokens}
        self._task = task
        self._num_kills = num_kills
        self._mode = mode
        self._lost: list[Any] = []

    def run(self, parts: Sequence[str]) -> None:
        if "kills" in parts or "clients" in parts:
            with LocalSwarm(built_in_path(), spans=SPANS * 2, mode=self._mode, num_threads=1) as swarm:
                if "kills" in parts:
                    self.kills(swarm)
                if "clients" in parts:
                    self.clients(swarm)
        if "bfloat16" in parts:
            spans = SPANS * 2
            with LocalSwarm(built_in_path(), spans=spans, mode=self._mode, num_threads=1, dtype="bfloat16") as swarm:
                self.bfloat16(swarm)

    def kills(self, swarm: LocalSwarm) -> None:
        task = self._task
        kinds = ["backward", "backward", Random(task.seed).choice(["forward", "backward"])][: self._num_kills]
        say(f"{task.steps} steps, {len(kinds)} kills")
        began_s = time.perf_counter()
        expected = train(_local(task), task, self.ids)
        local_s = time.perf_counter() - began_s
        killer = Killer(swarm, place(task.seed, task.steps, kinds))
        model = _remote(swarm, task)
        began_s = time.perf_counter()
        with killer.watching():
            found = train(model, task, self.ids, before_step=lambda step: setattr(killer, "step", step))
        took_s = time.perf_counter() - began_s
        stats = _close(model)
        self._lost = killer.lost
        losses, adapter = _difference(found, expected), adapter_difference(found, expected)
        self.bars += [
            Bar("kills that happened", len(killer.hits), ">=", len(kinds)),
            Bar("of these inside a backward", killer.inside("backward"), ">=", 1),
            Bar("failovers", stats.failovers, ">=", len(kinds)),
            Bar("largest difference of a loss to local", losses, "<=", MAX_LOSS_DIFFERENCE),
            Bar("final adapter, relative difference to local", adapter, "<=", MAX_ADAPTER_DIFFERENCE),
        ]
        name = f"float32, {task.steps} steps, {len(killer.hits)} kills"
        self.rows.append((name, f"{losses:.1e}", f"{adapter:.1e}", _ends(found)))
        self.result["kills"] = {
            "hits": [
                {"step": hit.step, "kind": hit.fault.kind, "span": str(hit.fault.span),
                 "after_ms": round(1000 * hit.after_s, 2), "error": hit.error}
                for hit in killer.hits
            ],
            "failovers": stats.failovers,
            "first_loss": found.losses[0],
            "last_loss": found.losses[-1],
            "largest_loss_difference": losses,
            "adapter_difference": adapter,
            "local_s": round(local_s, 1),
            "swarm_s": round(took_s, 1),
        }  # fmt: skip

    def clients(self, swarm: LocalSwarm) -> None:
        tasks = [replace(self._task, seed=7), replace(self._task, seed=8, rank=4, rows=3, rate=3e-3)]
        tasks = [replace(task, steps=max(10, task.steps // 4)) for task in tasks]
        say(f"two clients, {tasks[0].steps} steps")
        self._mend()
        alone = []
        for task in tasks:
            model = _remote(swarm, task)
            alone.append(train(model, task, self.ids))
            _close(model)
        together = self._together(swarm, tasks)
        worst = max(_difference(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
        adapter = max(adapter_difference(ours, theirs) for ours, theirs in zip(together, alone, strict=True))
        self.bars += [
            Bar("two clients: largest difference of a loss to the run alone", worst, "<=", 0.0),
            Bar("two clients: final adapters, relative difference", adapter, "<=", 0.0),
            Bar("two clients: difference of their last losses", _distance(*together), ">=", MAX_LOSS_DIFFERENCE),
        ]
        name = f"two clients at once, {tasks[0].steps} steps, to the runs alone"
        self.rows.append((name, f"{worst:.1e}", f"{adapter:.1e}", " and ".join(map(_ends, together))))
        self.result["clients"] = {"largest_loss_difference": worst, "adapter_difference": adapter}

    def _mend(self) -> None:
        """Start again those that were killed."""
        for peer in self._lost:
            peer.restart()
        if self._lost:
            time.sleep(REST_S)
        self._lost = []

    def _together(self, swarm: LocalSwarm, tasks: Sequence[Task]) -> list[Curve]:
        models = [_remote(swarm, task) for task in tasks]
        curves: list[Curve | None] = [None] * len(tasks)
        barrier = threading.Barrier(len(tasks))

        def meet(step: int) -> None:
            if step == 0:
                barrier.wait(60)

        def work(number: int) -> None:
            torch.set_num_threads(1)
            curves[number] = train(models[number], tasks[number], self.ids, before_step=meet)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(tasks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for model in models:
            _close(model)
        found = [curve for curve in curves if curve is not None]
        if len(found) < len(tasks):
            raise SystemExit("a client failed; see above")
        return found

    def bfloat16(self, swarm: LocalSwarm) -> None:
        task = replace(self._task, steps=4 if self._num_kills < 3 else 10)
        say(f"bfloat16, gradients of {task.steps} steps")
        local, model = _local(task, dtype=torch.bfloat16), _remote(swarm, task, dtype=torch.bfloat16)
        killer = Killer(swarm, place(task.seed, task.steps, ["backward"]))
        worst = 0.0
        with killer.watching():
            for killer.step in range(task.steps):
                for parameter in (*_trained(local).values(), *_trained(model).values()):
                    generator = torch.Generator().manual_seed(killer.step)
                    with torch.no_grad():  # else half of the gradients are zero at first
                        parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
                batch = task.batch(self.ids, killer.step)
                worst = max(worst, relative(_gradients(model, batch), _gradients(local, batch)))
        _close(model)
        self.bars += [
            Bar("bfloat16: kills inside a backward", killer.inside("backward"), ">=", 1),
            Bar("bfloat16: gradients, relative difference to local", worst, "<=", MAX_BF16_DIFFERENCE),
        ]
        self.rows.append((f"bfloat16, gradients of {task.steps} steps, 1 kill", "", f"{worst:.1e}", ""))
        self.result["bfloat16"] = {"gradient_difference": worst, "kills": len(killer.hits)}


def _local(task: Task, **options: Any) -> Any:
    return adapted(AutoModelForCausalLM.from_pretrained(built_in_path(), **options).eval(), task)


def _remote(swarm: LocalSwarm, task: Task, **options: Any) -> Any:
    return adapted(load(built_in_path(), trackers=swarm.trackers, mdns=False, **options), task)


def _close(model: Any) -> Any:
    """The client's counters; it is done."""
    layers = model.get_base_model().model.layers
    stats = layers.stats()
    layers.close()
    return stats


def _trained(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gradients(model: Any, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in _trained(model).items() if parameter.grad is not None}


def _difference(ours: Curve, theirs: Curve) -> float:
    return max(abs(x - y) for x, y in zip(ours.losses, theirs.losses, strict=True))


def _distance(ours: Curve, theirs: Curve) -> float:
    return abs(ours.losses[-1] - theirs.losses[-1])


def _ends(curve: Curve) -> str:
    return f"{curve.losses[0]:.3f} to {curve.losses[-1]:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(description="LoRA through a swarm whose peers are killed")
    parser.add_argument("--quick", action="store_true", help="20 steps and one kill")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    task = Task(seed=options.seed, steps=options.steps or (20 if options.quick else 200))
    bench = Bench(task, 1 if options.quick else 3)
    bench.run(options.only or PARTS)
    head = ("run", "largest difference of a loss", "relative difference of the adapter", "loss")
    return print_report(bench.result, bench.bars, table(head, bench.rows))


if __name__ == "__main__":
    sys.exit(main())
