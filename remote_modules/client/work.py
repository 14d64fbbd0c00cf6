"""What a chain drives: one pass over hops, as steps of a session and passes without one do it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from remote_modules.plan.routing import Demand, Hop

if TYPE_CHECKING:
    from remote_modules.client.chain import Chain

__all__ = ["Work"]


class Work(ABC):
    """What one pass does on its hops. `hops` holds those still to do, the next one first."""

    hops: list[Hop]
    demand: Demand
    is_pass = False  # whether it holds no session: rows may be done apart
    autocast: str | None = None  # of a pass

    @abstractmethod
    async def do_hop(self, hop: Hop, chain: Chain) -> None:
        """Do the next hop.

        Raises:
            PeerError: its peer failed; the state is as before.
        """

    @abstractmethod
    async def replace_hop(self, hop: Hop, hops: tuple[Hop, ...], chain: Chain) -> None:
        """Put ``hops`` in the place of the next one."""

    def forget_hop(self, hop: Hop) -> None:  # noqa: B027 - only sessions have something to forget
        """The peer lost the hop's session: build it anew when the hop is done next."""

    @abstractmethod
    def rival(self, hop: Hop) -> Work | None:
        """The next hop's work alone, to be done elsewhere at the same time; None if that cannot be.

        It changes nothing of this one, and is given other hops by `replace_hop`.
        """

    @abstractmethod
    def adopt(self, hop: Hop, rival: Work) -> None:
        """Take what the rival did for the work of the next hop, which was stopped."""

    def discard(self) -> None:  # noqa: B027 - only sessions hold something
        """This rival lost: free what peers hold for it."""

    def num_past_tokens(self) -> int:
        """Tokens of each row that another peer must be fed before it can do the next hop's work."""
        return 0
