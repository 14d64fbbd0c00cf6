"""Requests of this client that a peer has not answered yet.

A pipelined pass sends the next request before the last one is answered. What a request then waits for at its peer is
ours, no fault of the peer's: it counts neither as slowness nor towards a timeout, and says nothing of the link.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from remote_modules.peers import PeerId

__all__ = ["OwnRequests", "Sent"]


@dataclass(slots=True, eq=False)
class Sent:
    """One request under way.

    Attributes:
        began_s: when it was sent.
        expected_s: what it takes by itself.
        ahead_s: what those of ours that were sent before it, to the same peer, are expected to take.
        num_ahead: how many these are.
    """

    peer_id: PeerId
    began_s: float
    expected_s: float
    ahead_s: float = 0.0
    num_ahead: int = 0


@dataclass(slots=True)
class _Queue:
    waiting: list[Sent] = field(default_factory=list)
    answered_s: float = float("-inf")  # the last one that ended


class OwnRequests:
    """All peers of one client. Holds what is under way and nothing else."""

    def __init__(self) -> None:
        self._queues: dict[PeerId, _Queue] = {}

    def num_others(self, sent: Sent) -> int:
        """Under way at the peer beside this one."""
        queue = self._queues.get(sent.peer_id)
        return 0 if queue is None else sum(other is not sent for other in queue.waiting)

    def begin(self, peer_id: PeerId, *, expected_s: float, now_s: float) -> Sent:
        """A request is sent; `end` it in any case."""
        queue = self._queues.setdefault(peer_id, _Queue())
        ahead_s = sum(sent.expected_s for sent in queue.waiting)
        sent = Sent(peer_id, now_s, expected_s, ahead_s, len(queue.waiting))
        queue.waiting.append(sent)
        return sent

    def own_queue_s(self, sent: Sent, queue_s: float) -> float:
        """How much of the time that it waited at the peer was for requests of ours. Ask before `end`.

        Args:
            queue_s: what the peer says that it waited; more than we know of is not believed.
        """
        queue = self._queues.get(sent.peer_id)
        return 0.0 if queue is None else min(queue_s, max(0.0, queue.answered_s - sent.began_s))

    def end(self, sent: Sent, *, now_s: float) -> None:
        """It was answered, or is awaited no longer; without effect on one that `begin` did not make."""
        queue = self._queues.get(sent.peer_id)
        if queue is None or sent not in queue.waiting:
            return
        queue.waiting.remove(sent)
        queue.answered_s = now_s
        if not queue.waiting:
            del self._queues[sent.peer_id]
