"""Whether the device waits a moment for those who are about to come back, and whether a prompt runs in chunks.

Steps that wait when the device becomes free run together. Clients that decode come back a little after each answer: who
began at once would leave most of them for the next batch, and two half batches take nearly twice as long as a whole
one. So the device waits for sessions that are due soon, by how long each took to come back lately, and never longer
than the share of a batch's time that waiting for them may save. A session that does not come is not waited for again
before it has; one that is alone never waits.

A long prompt would keep all of them waiting: while others decode, it runs in chunks, between which they have a turn.

A session that has been alone for a while, with short steps, need not wait for the device's thread: handing a step over
and back costs more than it is worth when nobody else is kept waiting.

Pure: times go in, decisions come out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

__all__ = ["Decoders", "LoneSession", "Rounds"]

MAX_ROWS = 64
LINGER_SHARE = 0.5
MAX_LINGER_S = 0.025
LATENESS = 2.0  # times its usual absence that a session is waited for
SMOOTHING = 0.3
MAX_KNOWN = 4096
SHORT_S = 0.03  # others' messages may wait for so long
MANY_STEPS = 8  # of one session in a row, all of them short
DECODING_S = 0.5  # since its last step that a session counts as one that decodes


@dataclass(slots=True)
class _Known:
    """A session that decodes.

    Attributes:
        answered_s: when its last step was done; None while one waits or runs.
        absence_s: how long it takes to come back; None until it did.
    """

    answered_s: float | None = None
    absence_s: float | None = None


class Rounds:
    """What is known of the sessions that decode, and how long to wait for them."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        self._due_s: dict[Hashable, tuple[float, float]] = {}  # of those away: when they should come, and are late
        self._took_s = 0.0

    def came(self, who: Hashable, *, now_s: float) -> None:
        """A session brought a step."""
        known = self._known.setdefault(who, _Known())
        self._known.move_to_end(who)
        if len(self._known) > MAX_KNOWN:
            self._due_s.pop(self._known.popitem(last=False)[0], None)
        self._due_s.pop(who, None)
        if known.answered_s is not None:
            absence_s = now_s - known.answered_s
            before_s = absence_s if known.absence_s is None else known.absence_s
            known.absence_s = before_s + SMOOTHING * (absence_s - before_s)
            known.answered_s = None

    def answered(self, who: Iterable[Hashable], *, now_s: float, took_s: float) -> None:
        """Steps were done, together."""
        self._took_s = took_s
        for each in who:
            known = self._known.get(each)
            if known is not None:
                known.answered_s = now_s
                if known.absence_s is not None:
                    self._due_s[each] = (now_s + known.absence_s, now_s + LATENESS * known.absence_s)

    def wait_until(self, *, free_s: float, now_s: float) -> float:
        """When to begin with those who are here; ``now_s`` or earlier: at once.

        Args:
            free_s: when the device could have begun.
        """
        for who in [who for who, (_, late_s) in self._due_s.items() if late_s < now_s]:
            del self._due_s[who]  # it may be gone
        limit_s = free_s + min(MAX_LINGER_S, LINGER_SHARE * self._took_s)
        ends_s = (min(late_s, limit_s) for due_s, late_s in self._due_s.values() if due_s <= limit_s)
        return max(ends_s, default=free_s)


class LoneSession:
    """Whether the session whose steps come one after another, with none of others between them, has short ones."""

    def __init__(self) -> None:
        self._who: Hashable = None
        self._num_short = 0

    def came(self, who: Hashable) -> bool:
        """A session brought a step; None: other work came. Whether the step may run where it came."""
        if who is None or who != self._who:
            self._who, self._num_short = who, 0
        return self._num_short >= MANY_STEPS

    def done(self, took_s: float) -> None:
        """Work was done."""
        self._num_short = self._num_short + 1 if took_s <= SHORT_S else 0


class Decoders:
    """Sessions that decode."""

    def __init__(self) -> None:
        self._seen_s: OrderedDict[Hashable, float] = OrderedDict()  # the latest last

    def came(self, who: Hashable, *, now_s: float) -> None:
        """A session brought a step of one token."""
        self._seen_s[who] = now_s
        self._seen_s.move_to_end(who)
        if len(self._seen_s) > MAX_KNOWN:
            self._seen_s.popitem(last=False)

    def others(self, who: Hashable, *, now_s: float, is_open: Callable[[Hashable], bool]) -> bool:
        """Whether any but ``who`` decodes, of those that are still open."""
        for each, seen_s in reversed(self._seen_s.items()):
            if now_s - seen_s > DECODING_S:
                return False
            if each != who and is_open(each):
                return True
        return False
