"""Who gets the device next, and who is told to come back later.

Pure: tickets and the time go in, decisions come out; nothing here waits or computes.

    order     -> by priority; within one, the clients take turns, each with its oldest ticket first
    patience  -> tickets that may be passed over only so many times go before those of smaller priority then
    queue full -> whoever holds most of it gives way: a newcomer with little waiting displaces the youngest and least
                  urgent ticket of the client that has the most, unless that is more urgent than its own
    deadline  -> a ticket whose client no longer waits is never begun
    together  -> with a ticket others of its group may be served at once; the clients take turns there too

So a client that asks for four times what the device can do fills its own share of the queue and no more.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

__all__ = ["AdmissionQueue", "Ticket"]

MIN_RETRY_S = 0.05
MAX_RETRY_S = 30.0
SMOOTHING = 0.2
UNKNOWN_JOB_S = 0.05  # until the first job is done


@dataclass(slots=True, eq=False, kw_only=True)
class Ticket:
    """One request for the device.

    Attributes:
        priority: smaller goes first.
        client: who asks; any number that is one client's own.
        deadline_s: after this nobody wants the result.
        group: tickets of one group may be served together; None: alone.
        rows: how much of such a batch it is.
        patience: how often in a row tickets of smaller priority may be served while those of this one wait.
    """

    priority: int
    client: int
    deadline_s: float
    group: Hashable | None = None
    rows: int = 1
    patience: float = math.inf


T = TypeVar("T", bound=Ticket)


class AdmissionQueue(Generic[T]):
    """Tickets that wait.

    Args:
        max_waiting: tickets held at once.
    """

    def __init__(self, *, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._turns: dict[int, OrderedDict[int, deque[T]]] = {}
        self._num_waiting: Counter[int] = Counter()
        self._num_passed: Counter[int] = Counter()  # by priority: times in a row that others went before it
        self._job_s = UNKNOWN_JOB_S

    def __len__(self) -> int:
        return sum(self._num_waiting.values())

    @property
    def retry_after_s(self) -> float:
        """When there will be room: the time that what waits now takes, by what jobs took lately."""
        return min(MAX_RETRY_S, max(MIN_RETRY_S, len(self) * self._job_s))

    def put(self, ticket: T, *, now_s: float) -> list[T]:
        """Queue ``ticket``; the tickets to refuse, which may be the new one, and those whose deadline has passed."""
        refused: list[T] = []
        if len(self) >= self._max_waiting:
            refused = [old for old in self._all() if old.deadline_s <= now_s]
            for old in refused:
                self.remove(old)
        if len(self) >= self._max_waiting:
            victim = self._victim_for(ticket)
            if victim is None:
                return [*refused, ticket]
            self.remove(victim)
            refused.append(victim)
        turns = self._turns.setdefault(ticket.priority, OrderedDict())
        turns.setdefault(ticket.client, deque()).append(ticket)
        self._num_waiting[ticket.client] += 1
        return refused

    def take(self, *, now_s: float) -> tuple[T | None, list[T]]:
        """The ticket whose turn it is, and those that were passed over because their deadline has passed."""
        expired: list[T] = []
        while self._turns:
            priority = self._next_priority()
            turns = self._turns[priority]
            client = next(iter(turns))
            ticket = turns[client][0]
            self.remove(ticket)
            if ticket.deadline_s > now_s:
                if client in turns:
                    turns.move_to_end(client)
                self._num_passed[priority] = 0
                self._num_passed.update(waiting for waiting in self._turns if waiting > priority)
                return ticket, expired
            expired.append(ticket)
        return None, expired

    def take_like(self, ticket: T, *, room: int, now_s: float) -> list[T]:
        """Others of the group of ``ticket``, which was taken: as many as have ``room`` rows in all, in turns."""
        taken: list[T] = []
        turns = self._turns.get(ticket.priority)
        if ticket.group is None or turns is None:
            return taken
        clients = deque(turns)
        while clients:
            client = clients.popleft()
            found = next((t for t in turns[client] if _is_like(t, ticket, room, now_s)), None)
            if found is None:
                continue
            self.remove(found)
            taken.append(found)
            room -= found.rows
            if client in turns:
                turns.move_to_end(client)
                clients.append(client)
        return taken

    def remove(self, ticket: T) -> bool:
        """Take ``ticket`` out; False if it does not wait here."""
        turns = self._turns.get(ticket.priority)
        tickets = None if turns is None else turns.get(ticket.client)
        if turns is None or tickets is None or ticket not in tickets:
            return False
        tickets.remove(ticket)
        self._num_waiting[ticket.client] -= 1
        if not self._num_waiting[ticket.client]:
            del self._num_waiting[ticket.client]
        if not tickets:
            del turns[ticket.client]
            if not turns:
                del self._turns[ticket.priority]
        return True

    def clear(self) -> list[T]:
        """All that waited, in no order."""
        tickets = list(self._all())
        self._turns.clear()
        self._num_waiting.clear()
        return tickets

    def done(self, *, took_s: float, num_jobs: int = 1) -> None:
        """Learn from what the device has done: one job, or several at once."""
        for _ in range(num_jobs):
            self._job_s += SMOOTHING * (took_s / num_jobs - self._job_s)

    def _next_priority(self) -> int:
        """The smallest, or the first whose patience is over."""
        if len(self._turns) == 1:
            return next(iter(self._turns))
        ready = (
            priority
            for priority, turns in self._turns.items()
            if self._num_passed[priority] >= next(iter(turns.values()))[0].patience
        )
        return min(ready, default=min(self._turns))

    def _all(self) -> Iterator[T]:
        return chain.from_iterable(tickets for turns in self._turns.values() for tickets in turns.values())

    def _victim_for(self, newcomer: T) -> T | None:
        client, most = max(self._num_waiting.items(), key=lambda item: item[1])
        if most <= self._num_waiting[newcomer.client] + 1:
            return None
        priority = max(priority for priority, turns in self._turns.items() if client in turns)
        return self._turns[priority][client][-1] if priority >= newcomer.priority else None


def _is_like(ticket: Ticket, other: Ticket, room: int, now_s: float) -> bool:
    return ticket.group == other.group and ticket.rows <= room and ticket.deadline_s > now_s
