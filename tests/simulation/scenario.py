"""Random runs of a simulated swarm: what the client does, what happens to it, and what must hold afterwards."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar

import torch

from remote_modules.client.call import CallArguments, Named
from remote_modules.client.passes import backward, forward
from remote_modules.client.session import SessionState
from remote_modules.config import ClientConfig
from remote_modules.errors import NoRouteError
from remote_modules.spans import Span
from remote_modules.testing.fault_points import CancelledAt
from remote_modules.testing.simulation import SimulatedSwarm

from .faults import Weather
from .oracle import Oracle, adapter_of, lesson_of, positions, wrong_in_lesson
from .tiny import PAD, VOCABULARY, TinyModel, call_of

T = TypeVar("T")

SETTLE_S = 45.0  # longer than a lease and an announcement
LONGEST_SETTLE_S = 100.0  # longer than any timeout of a session
NUM_TOKENS = (3, 5, 8)
NUM_LESSONS = 4
PATIENCE_S = 1.0  # between attempts of a client that never found a tracker
MAX_ATTEMPTS = 60


@dataclass
class Report:
    """What a run did; equal for equal seeds."""

    seed: int
    faults: list[str] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    num_failovers: int = 0
    num_steps: int = 0
    longest_pass_s: float = 0.0
    ended_s: float = 0.0
    violations: list[str] = field(default_factory=list)


def blocks_of(model: TinyModel) -> Span:
    return Span(0, model.num_blocks)


async def random_run(
    model: TinyModel, spans: tuple[str, ...], seed: int, kinds: list[str] | None = None, most: int = 5
) -> Report:
    """One client generates and trains while a random schedule of faults runs; then everything must come to rest.

    Args:
        kinds: of the faults; None for all.
        most: how many may happen.
    """
    rng = Random(seed)
    config = ClientConfig(
        keep_histories=rng.choice(["each_hop", "each_hop", "first"]),
        exact_replay=rng.random() < 0.2,
        max_replay_tokens=rng.choice([512, 512, 4]),
        hedge=rng.random() < 0.5,
        replicate_kv=rng.random() < 0.3,
        replicate_tokens=2,
    )
    holdings = [model.holdings[span] for span in spans]
    swarm = SimulatedSwarm(seed, holdings, config=config, num_trackers=rng.choice([1, 1, 3]))
    await swarm.start()
    run = _Run(model, swarm, rng)
    faults = asyncio.get_running_loop().create_task(run.weather.blow(kinds, most))
    try:
        await run.use(rng.choice(NUM_TOKENS))
    finally:
        await faults
        await run.weather.clear()
    await run.settle()
    swarm.stop()
    return run.report


class _Run:
    def __init__(self, model: TinyModel, swarm: SimulatedSwarm, rng: Random) -> None:
        self.model = model
        self.swarm = swarm
        self.rng = rng
        self.report = Report(swarm.seed, violations=swarm.violations, fired=swarm.network.fired)
        self.weather = Weather(swarm, rng, ["client-0"], begun=self.report.faults)
        self.client = swarm.client("client-0")
        self.adapter = adapter_of(model) if rng.random() < 0.25 else None
        self.oracle = Oracle(model, self.adapter)
        self._may_vanish = True

    async def use(self, num_tokens: int) -> None:
        if self.rng.random() < 0.2:  # both at once
            self._may_vanish = self.swarm.watches_bans = False  # what one finds out does not stop the other
            await asyncio.gather(self._generate(num_tokens), self._train())
        else:
            await self._generate(num_tokens)
            await self._train()

    # ------------------------------------------------------------------------------------- generation

    async def _generate(self, num_tokens: int) -> None:
        rng, model = self.rng, self.model
        tokens, mask = self._prompt()
        session = self._new_session()
        start = 0
        for _ in range(num_tokens):
            new = model.embed(tokens[:, start:])
            call = call_of(new, positions(tokens, mask)[:, start:], mask, self.adapter)
            outputs = await self._step(session, new, call)
            logits = model.logits(outputs["hidden_states"][:, -1:])
            self.oracle.note(f"step at position {session.position}", tokens, mask, logits)
            self.report.num_steps += 1
            start = tokens.shape[1]
            tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            tokens, mask, start = self._change_cache(session, tokens, mask, start)
            session, start = await self._change_session(session, start)
            await asyncio.sleep(rng.choice([0.0, 0.0, 0.05, 1.0]))
        await session.close()

    def _prompt(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        rng = self.rng
        rows, length = rng.choice([1, 1, 2, 3]), rng.randint(1, 6)
        tokens = torch.tensor([[rng.randrange(1, VOCABULARY) for _ in range(length)] for _ in range(rows)])
        mask = torch.ones_like(tokens) if rows > 1 else None
        if mask is not None and length > 1:
            tokens[0, 0], mask[0, 0] = PAD, 0  # the first row is left-padded
        return tokens, mask

    def _new_session(self) -> SessionState:
        return SessionState(self.client, blocks_of(self.model), lambda callback: callback())

    async def _step(self, session: SessionState, new: torch.Tensor, call: CallArguments) -> Named:
        """One step, perhaps cancelled at some moment and then done anew."""
        if self.rng.random() < 0.1:
            cancelled = CancelledAt(session.step({"hidden_states": new}, call), at=self.rng.randint(1, 4))
            task = asyncio.ensure_future(self._on_client(_awaited(cancelled)))
            await asyncio.wait([task])
            self.swarm.network.fired["client cancelled"] += cancelled.fired
            if not task.cancelled() and not isinstance(task.exception(), NoRouteError):
                result: Named = task.result()
                return result
        outputs: Named = await self._timed(lambda: session.step({"hidden_states": new}, call))
        return outputs

    def _change_cache(
        self, session: SessionState, tokens: torch.Tensor, mask: torch.Tensor | None, start: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Sometimes what beam search and assisted decoding do: reorder rows, or take tokens back."""
        rng, rows = self.rng, tokens.shape[0]
        if rows > 1 and rng.random() < 0.3:
            order = torch.tensor([rng.randrange(rows) for _ in range(rows)])
            session.select(order)
            return tokens[order], None if mask is None else mask[order], start
        if start > 2 and rng.random() < 0.2:
            kept = rng.randint(1, start - 1)
            session.crop(kept)
            return tokens[:, : kept + 1], None if mask is None else mask[:, : kept + 1], kept
        return tokens, mask, start

    async def _change_session(self, session: SessionState, start: int) -> tuple[SessionState, int]:
        """Sometimes a fork goes on in its place, or the client's machine is lost and another begins anew."""
        chance = self.rng.random()
        if chance < 0.04:
            fork = copy.deepcopy(session)
            await session.close()
            return fork, start
        if chance < 0.08 and self._may_vanish:
            self.swarm.network.fired["client vanishes"] += 1
            self.swarm.network.dialler(self.weather.clients[-1]).vanish()
            await self.client.aclose()
            self.weather.clients.append(f"client-{len(self.weather.clients)}")
            self.client = self.swarm.client(self.weather.clients[-1])
            return self._new_session(), 0
        return session, start

    # --------------------------------------------------------------------------------------- training

    async def _train(self) -> None:
        rng, blocks = self.rng, blocks_of(self.model)
        lesson = lesson_of(
            self.model, rng.randrange(NUM_LESSONS), has_adapter=self.adapter is not None, is_ragged=rng.random() < 0.3
        )
        named = {"hidden_states": lesson.inputs}
        outputs, recorded, segments = await self._timed(lambda: forward(self.client, blocks, named, lesson.call))
        await asyncio.sleep(rng.choice([0.0, 0.5]))
        grads = {"hidden_states": torch.ones_like(lesson.inputs)}
        found, of_adapter = await self._timed(lambda: backward(self.client, segments, grads))
        if (outputs.keys(), recorded, found.keys()) != (grads.keys(), {}, grads.keys()):
            self.report.violations.append("I6: names of outputs or gradients are others")
        else:
            was_cut = self.client.most_tokens > 0  # as no peer had memory for all rows
            wrong = wrong_in_lesson(
                lesson, outputs["hidden_states"], found["hidden_states"], of_adapter, was_cut=was_cut
            )
            self.report.violations += wrong

    # ------------------------------------------------------------------------------------- both

    async def _timed(self, begin: Any) -> Any:
        """Do it and note how long it took; it must end by its deadline, and the answer be no error.

        A client that never reached a tracker is told so at once, and tries again.
        """
        swarm, client = self.swarm, self.client
        for _ in range(MAX_ATTEMPTS):
            began_s, slept_s = swarm.clock(), self.weather.suspended_s
            try:
                return await self._on_client(begin())
            except NoRouteError:
                if not client.is_unanswered:
                    raise
                self.swarm.network.fired["told that no tracker answers"] += 1
                await asyncio.sleep(PATIENCE_S)
            finally:
                took_s = swarm.clock() - began_s - (self.weather.suspended_s - slept_s)
                self.report.longest_pass_s = max(self.report.longest_pass_s, round(took_s, 6))
                if took_s > swarm.config.pass_deadline_s + 1.0:
                    self.report.violations.append(f"I5: a pass took {took_s:.1f} s")
        raise AssertionError("no tracker ever answered")

    async def _on_client(self, work: Coroutine[Any, Any, T]) -> T:
        """As the client's host does: not while it sleeps."""
        host = self.swarm.network.dialler(self.weather.clients[-1])
        task: asyncio.Task[T] = host.context.run(asyncio.get_running_loop().create_task, work)
        return await task

    async def settle(self) -> None:
        """What must hold once every fault is over and every lease and session had time to end."""
        swarm, violations = self.swarm, self.report.violations
        await self.client.aclose()
        await asyncio.sleep(SETTLE_S)
        ends_s = swarm.clock() + LONGEST_SETTLE_S
        while swarm.clock() < ends_s and any(peer.kv_bytes for peer in swarm.peers):  # noqa: ASYNC110
            await asyncio.sleep(10.0)
        for peer in swarm.peers:
            assert peer.handler is not None
            held = (peer.kv_bytes, len(peer.handler.sessions), peer.device.load, peer.handler.num_connections)
            if held != (0, 0, 0, 0) or peer.host.num_connections:
                names = "KV bytes, sessions, jobs, connections"
                violations.append(
                    f"I3, I4: peer {peer.span} still holds {held} {names}, {peer.host.num_connections} links"
                )
        expected = {peer.identity.peer_id: peer.instance_id for peer in swarm.peers}
        for tracker in swarm.trackers:
            listed = {peer_id: record.instance_id for peer_id, record in tracker.live().items()}
            if listed != expected:
                violations.append(f"I8: {tracker.address} lists {sorted(listed.values())}")
        alive = Counter(getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks())
        for waiting in ("_try", "Event.wait"):  # of an announcement that is under way, or not yet due
            del alive[waiting]
        if alive != {"Announcer._run": len(swarm.peers) * len(swarm.trackers), "random_run": 1}:
            violations.append(f"I4: tasks {dict(alive)} are alive")
        violations += self.oracle.differences()
        self.report.num_failovers = self.client.stats.failovers
        self.report.ended_s = round(swarm.clock(), 6)


async def _awaited(work: CancelledAt) -> Any:
    return await work
