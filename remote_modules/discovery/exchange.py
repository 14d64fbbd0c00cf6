"""Discovery through the peers themselves: each tells what it knows of the others, so that no tracker is needed.

A peer answers on its own port what a tracker answers (`discovery.exchange_site`), from the table of peers that it knows
(`discovery.known_peers`). Whoever knows one peer finds the others:

    lookup      asks known peers, then those that they name, until `FANOUT` have answered and name nobody new
    announce    tells `FANOUT` known peers, and learns what they know

Records are believed by their signature alone, and last for one lease after their peer was last known to live
(`discovery.peers_answer` counts the age): a dead peer is not kept alive by being talked about.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from random import Random

import aiohttp
import msgspec

from remote_modules.discovery.base import Discovery, NobodyToAskError
from remote_modules.discovery.http_json import ask, make_session
from remote_modules.discovery.known_peers import KnownPeers
from remote_modules.discovery.peers_answer import PEERS_PATH, PeersReader
from remote_modules.discovery.tracker_client import ANNOUNCE_PATH, WITHDRAW_PATH, refusal_of
from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, SignedRecord, check_address, decode_record, is_loopback
from remote_modules.plan.leases import StaleRecordError

__all__ = ["ExchangeDiscovery"]

logger = logging.getLogger(__name__)

FANOUT = 3  # peers asked or told at a time
MAX_REMEMBERED = 8  # asked at a time of those whose life is not known
MAX_ANSWERS = 8  # in one lookup: `exchange_site.MAX_TOLD` peers each
MAX_ASKED = 32  # in one lookup
MAX_TRIED = 2  # addresses of one peer
GRACE_S = 0.5  # for the other peers, once one has answered
INTERVAL_S = 30.0  # between lookups that really ask, while other sources do well
FIRST_PAUSE_S = 1.0  # before an address that failed is asked again; doubles
MAX_PAUSE_S = 60.0
MAX_FAILING = 1024  # addresses

Target = tuple[str, ...]  # addresses of one peer, tried in order


class ExchangeDiscovery:
    """See `Discovery` for the contract.

    Args:
        known: what is read, and told of all that is learned.
        seeds: addresses of peers to ask in any case.
        feeders: other sources, asked for someone to tell when nobody is known.
        timeout_s: bounds each request.
    """

    def __init__(
        self,
        known: KnownPeers,
        *,
        seeds: Sequence[str] = (),
        feeders: Sequence[Discovery] = (),
        timeout_s: float = 3.0,
        rng: Random | None = None,
    ) -> None:
        for seed in seeds:
            check_address(seed)
        self._known = known
        self._seeds = [(seed,) for seed in dict.fromkeys(seeds)]
        self._feeders = tuple(feeders)
        self._timeout_s = timeout_s
        self._clock = known.clock
        self._rng = rng or Random()
        self._session: aiohttp.ClientSession | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._failing: dict[Target, tuple[float, float]] = {}  # when to ask again, and the pause; latest last
        self._asked_s = float("-inf")
        self._is_closed = False

    @property
    def is_due(self) -> bool:
        """Whether the last lookup is so long ago that the next should ask."""
        return self._clock() - self._asked_s >= INTERVAL_S

    def recall(self, model_key: str | None) -> list[PeerRecord]:
        """What is known without asking."""
        return self._known.records(model_key)

    async def lookup(self, model_key: str | None) -> list[PeerRecord]:
        """Ask known peers, and return all peers known to live.

        Raises:
            NobodyToAskError: no peer is known.
            DiscoveryError: none of those that are known answered.
        """
        self._asked_s = self._clock()
        num_answers, failures = await self._ask_around(model_key)
        self._known.save()
        if num_answers == 0:
            if failures:
                raise DiscoveryError(f"no known peer answered: {'; '.join(map(str, failures[:4]))}")
            raise NobodyToAskError("no peer is known to ask for others")
        return self.recall(model_key)

    async def announce(self, signed: SignedRecord) -> None:
        """Tell some of the peers that serve the same model.

        Raises:
            NobodyToAskError: none is known; other sources are asked for some, for the next time.
            StaleRecordError: one knows something newer of this peer, and has proved it.
            DiscoveryError: none took it.
        """
        model_key = decode_record(signed.payload).model_key
        told = await self._tell(ANNOUNCE_PATH, signed, model_key)
        await asyncio.gather(*(self._learn(target, model_key) for target in told))
        self._known.save()

    async def withdraw(self, signed: SignedRecord) -> None:
        """Say goodbye to some of the peers that serve the same model; others wait for the lease to end.

        Raises:
            NobodyToAskError: none is known.
            DiscoveryError: none took it.
        """
        await self._tell(WITHDRAW_PATH, signed, decode_record(signed.payload).model_key)

    async def aclose(self) -> None:
        """Close the connections and keep on disk what is known; idempotent."""
        self._is_closed = True
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.gather(self._feeding, return_exceptions=True)
        self._known.save()
        if self._session is not None:
            await self._session.close()

    async def _ask_around(self, model_key: str | None) -> tuple[int, list[DiscoveryError]]:
        """Ask, and then those that were named; how many answered, and why the others did not."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + 2 * self._timeout_s
        asked: set[Target] = set()
        pending: set[asyncio.Task[DiscoveryError | None]] = set()
        failures: list[DiscoveryError] = []
        num_answers = num_known = 0
        try:
            while (left_s := deadline_s - loop.time()) > 0:
                num_before, num_known = num_known, len(self._known.leases(model_key)[0])
                if num_answers < FANOUT or (num_known > num_before and num_answers < MAX_ANSWERS):
                    targets = self._choose(model_key, asked, num_answers)[: MAX_ASKED - len(asked)]
                    asked.update(targets)
                    pending.update(loop.create_task(self._learn(target, model_key)) for target in targets)
                if not pending:
                    break
                timeout_s = min(left_s, GRACE_S) if num_answers else left_s
                done, pending = await asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    break
                outcomes = [task.result() for task in done]
                failures += [outcome for outcome in outcomes if outcome is not None]
                num_answers += outcomes.count(None)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        return num_answers, failures + [DiscoveryError("no answer in time")] * bool(pending)

    def _choose(self, model_key: str | None, asked: set[Target], num_answers: int) -> list[Target]:
        """Whom to ask next: the given and some of the living; those remembered only until somebody answers."""
        living = self._usable((record.addresses for record in self._known.records(model_key)), asked)
        targets = self._usable(self._seeds, asked) if num_answers == 0 else []
        targets += self._rng.sample(living, min(FANOUT, len(living)))
        if num_answers == 0 and len(living) <= FANOUT:
            targets += self._usable(self._known.remembered(model_key), asked)[:MAX_REMEMBERED]
        return list(dict.fromkeys(targets))

    def _usable(self, targets: Iterable[Target], asked: set[Target]) -> list[Target]:
        now_s = self._clock()
        return [one for one in targets if one not in asked and self._failing.get(one, (0.0, 0.0))[0] <= now_s]

    async def _learn(self, target: Target, model_key: str | None) -> DiscoveryError | None:
        """Ask one peer for those it knows; the failure, if it does not answer."""
        params = None if model_key is None else {"model_key": model_key}
        failure = DiscoveryError("no address")
        for address in target[:MAX_TRIED]:
            asked_s = self._clock()
            host, who = check_address(address)[0], f"peer {address}"
            via = "127.0.0.1" if is_loopback(host) else host
            try:
                answer = await ask(self._open(), _url(address, PEERS_PATH), who=who, params=params, verify_tls=False)
                if answer.status != 200:
                    raise refusal_of(answer, who, None)
                heard = await PeersReader(who, level=logging.DEBUG).read(answer.body)
            except DiscoveryError as exc:
                failure = exc
                continue
            for one in heard:
                if model_key in (None, one.record.model_key):
                    self._known.hear(one.signed, one.record, at_s=asked_s - one.age_s, via=via)
            self._failing.pop(target, None)
            return None
        self._note_failure(target)
        logger.debug("x exchange failed: %s", failure)
        return failure

    async def _tell(self, path: str, signed: SignedRecord, model_key: str) -> list[Target]:
        living = self._usable((record.addresses for record in self._known.records(model_key)), set())
        targets = self._rng.sample(living, min(FANOUT, len(living)))
        targets = list(dict.fromkeys([*targets, *self._usable(self._seeds, set())[:FANOUT]]))
        if not targets:
            self._start_feeding(model_key)
            raise NobodyToAskError("no peer is known to tell")
        outcomes = await asyncio.gather(*(self._post(target, path, signed) for target in targets))
        failures = [outcome for outcome in outcomes if outcome is not None]
        for failure in failures:
            if isinstance(failure, StaleRecordError):
                raise failure
        if len(failures) == len(targets):
            raise DiscoveryError(f"no known peer took it: {'; '.join(map(str, failures[:4]))}") from failures[0]
        return [target for target, outcome in zip(targets, outcomes, strict=True) if outcome is None]

    async def _post(self, target: Target, path: str, signed: SignedRecord) -> DiscoveryError | None:
        failure = DiscoveryError("no address")
        for address in target[:MAX_TRIED]:
            who = f"peer {address}"
            try:
                body = msgspec.json.encode(signed)
                answer = await ask(self._open(), _url(address, path), who=who, body=body, verify_tls=False)
            except DiscoveryError as exc:
                failure = exc
                continue
            self._failing.pop(target, None)
            return None if answer.status == 200 else refusal_of(answer, who, signed)
        self._note_failure(target)
        return failure

    def _note_failure(self, target: Target) -> None:
        _, pause_s = self._failing.pop(target, (0.0, FIRST_PAUSE_S / 2))
        pause_s = min(2 * pause_s, MAX_PAUSE_S)
        self._failing[target] = (self._clock() + pause_s * self._rng.uniform(0.5, 1.0), pause_s)
        if len(self._failing) > MAX_FAILING:
            del self._failing[next(iter(self._failing))]

    def _start_feeding(self, model_key: str) -> None:
        """Look for someone to tell, in the background: an announcement must not wait for it."""
        if self._feeders and not self._is_closed and (self._feeding is None or self._feeding.done()):
            self._feeding = asyncio.get_running_loop().create_task(self._feed(model_key))

    async def _feed(self, model_key: str) -> None:
        for outcome in await asyncio.gather(
            *(feeder.lookup(model_key) for feeder in self._feeders), return_exceptions=True
        ):
            if isinstance(outcome, Exception) and not isinstance(outcome, DiscoveryError):
                raise outcome

    def _open(self) -> aiohttp.ClientSession:
        if self._is_closed:
            raise DiscoveryError("peer exchange is closed")
        if self._session is None:
            self._session = make_session(self._timeout_s)
        return self._session


def _url(address: str, path: str) -> str:
    # As for records (`record_fetch`): TLS hides nothing that is secret here, and what is said proves itself.
    scheme = "http" if is_loopback(check_address(address)[0]) else "https"
    return f"{scheme}://{address}{path}"
