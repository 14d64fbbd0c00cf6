"""What happens to bytes between two hosts, in one direction: delays, losses and damage, all counted.

As TCP shows them: a lost segment is a delay of one retransmission timeout, doubled with each further loss; a cut path
holds everything until it heals; only what never reaches TCP (memory, a relay's buffer) flips bits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

__all__ = ["MAX_SLICE_BYTES", "SEGMENT_BYTES", "Path"]

MAX_SLICE_BYTES = 4096
SEGMENT_BYTES = 1460
MIN_RETRANSMISSION_S = 0.2  # Linux
MAX_RETRANSMISSIONS = 8


@dataclass(slots=True)
class Path:
    """One direction between two hosts; changes take effect with the next bytes that are sent.

    Attributes:
        delay_s: beyond that of the hosts.
        jitter_s: up to so much more for each write; connections overtake each other, bytes of one never do.
        loss: probability that a segment is lost, each time that it is sent.
        bytes_per_s: shared by all connections; None for no limit.
        is_cut: nothing arrives until it heals, and nobody is told.
        max_slice_bytes: the receiver gets bytes in slices of random length up to this.
        flip: probability that one bit of a write changes.
        truncate: probability that only the first bytes of a write arrive, and then a reset.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    bytes_per_s: float | None = None
    is_cut: bool = False
    max_slice_bytes: int = MAX_SLICE_BYTES
    flip: float = 0.0
    truncate: float = 0.0
    free_at_s: float = 0.0

    def seconds(self, num_bytes: int, now_s: float, hosts_s: float, rng: Random, fired: Counter[str]) -> float:
        """How long ``num_bytes`` that are sent now are on the way; ``hosts_s`` is the delay of the two hosts."""
        seconds = hosts_s + self.delay_s
        fired["slow link"] += self.delay_s > 0
        if self.jitter_s:
            fired["jitter"] += 1
            seconds += rng.uniform(0.0, self.jitter_s)
        if self.bytes_per_s is not None:
            fired["bandwidth"] += 1
            self.free_at_s = max(now_s, self.free_at_s) + num_bytes / self.bytes_per_s
            seconds += self.free_at_s - now_s
        if self.loss:
            seconds += self._retransmitting_s(num_bytes, hosts_s, rng, fired)
        return seconds

    def _retransmitting_s(self, num_bytes: int, hosts_s: float, rng: Random, fired: Counter[str]) -> float:
        longest_s = 0.0
        for _ in range(1 + num_bytes // SEGMENT_BYTES):
            waited_s, timeout_s = 0.0, max(MIN_RETRANSMISSION_S, 2 * hosts_s)
            for _ in range(MAX_RETRANSMISSIONS):
                if rng.random() >= self.loss:
                    break
                fired["loss"] += 1
                waited_s += timeout_s
                timeout_s *= 2
            longest_s = max(longest_s, waited_s)
        return longest_s

    def damage(self, data: bytes, rng: Random, fired: Counter[str]) -> tuple[bytes, bool]:
        """What arrives of one write, and whether the connection breaks after it."""
        if self.truncate and rng.random() < self.truncate:
            fired["truncate"] += 1
            return data[: rng.randrange(len(data))], True
        if self.flip and rng.random() < self.flip:
            fired["flip"] += 1
            return flipped(data, rng), False
        return data, False


def flipped(data: bytes, rng: Random) -> bytes:
    """``data`` with one bit changed."""
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)
