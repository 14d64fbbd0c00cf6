"""Leases in a Redis or Valkey that several trackers share, so that each of them knows what was told to any.

The rules are decided here, by the code that the memory uses (`plan.leases`), and written there only if nothing changed
in between: a script compares the version of the lease and writes, or says "changed", and then all is decided again.
The server's clock alone counts time, and it drops what has expired by itself.

::

    {remote-modules}:lease:PEER   hash: version, payload, public_key, signature, retired, at_ms; expires with the lease
    {remote-modules}:all          sorted set: peer ids by the time at which their leases end, in ms
    {remote-modules}:model:KEY    the same for one model

All keys share one hash tag, so that a cluster keeps them on one node, as scripts need.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar, cast

import msgspec
import redis.asyncio as redis
from redis.exceptions import RedisError

from remote_modules.discovery.storage import Listing, StorageDownError
from remote_modules.errors import DiscoveryError
from remote_modules.peers import PeerRecord, SignedRecord, decode_record, short_id
from remote_modules.plan.leases import Lease, TableFullError, check_announced, check_withdrawn

__all__ = ["RedisStorage"]

PREFIX = "{remote-modules}:"
TIMEOUT_S = 3.0  # one command
MAX_CONNECTIONS = 64
MAX_ATTEMPTS = 8  # others changed the same lease in between; a peer announces to one tracker at a time
BATCH = 512  # leases read by one script

_T = TypeVar("_T")
_retired_encoder = msgspec.msgpack.Encoder()
_retired_decoder = msgspec.msgpack.Decoder(tuple[str, ...])

_NOW = "local t = redis.call('TIME') local now = t[1] * 1000 + math.floor(t[2] / 1000) "

# KEYS: lease, all, model, model before. ARGV: peer, expected version, new version, payload, public_key, signature,
# retired, lease in ms, room.
_ANNOUNCE = (
    _NOW
    + """
if (redis.call('HGET', KEYS[1], 'version') or '') ~= ARGV[2] then return 'changed' end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now)
if ARGV[2] == '' and redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[9]) then return 'full' end
if KEYS[4] ~= KEYS[3] then redis.call('ZREM', KEYS[4], ARGV[1]) end
redis.call('HSET', KEYS[1], 'version', ARGV[3], 'payload', ARGV[4], 'public_key', ARGV[5], 'signature', ARGV[6],
    'retired', ARGV[7], 'at_ms', now)
redis.call('PEXPIREAT', KEYS[1], now + ARGV[8])
redis.call('ZADD', KEYS[2], now + ARGV[8], ARGV[1])
redis.call('ZADD', KEYS[3], now + ARGV[8], ARGV[1])
local last = redis.call('ZREVRANGE', KEYS[3], 0, 0, 'WITHSCORES')
redis.call('PEXPIREAT', KEYS[3], last[2])
return 'taken'
"""
)

# KEYS: lease, all, model. ARGV: peer, expected version.
_WITHDRAW = """
if (redis.call('HGET', KEYS[1], 'version') or '') ~= ARGV[2] then return 'changed' end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
return 'taken'
"""

# KEYS: all, or a model. ARGV: how many at most; 0 for all.
_PEER_IDS = (
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if tonumber(ARGV[1]) > 0 then return redis.call('ZRANDMEMBER', KEYS[1], ARGV[1]) end
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""
)

# KEYS: leases. The time, then payload, public_key, signature, retired, at_ms and what is left in ms of each.
_READ = (
    _NOW
    + """
local found = {tostring(now)}
for _, key in ipairs(KEYS) do
    local lease = redis.call('HMGET', key, 'payload', 'public_key', 'signature', 'retired', 'at_ms', 'version')
    if lease[1] then
        lease[7] = redis.call('PTTL', key)
        found[#found + 1] = lease
    end
end
return found
"""
)

# KEYS: all.
_COUNT = _NOW + "redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now) return redis.call('ZCARD', KEYS[1])"


class RedisStorage:
    """See `LeaseStorage`. Connects when first used.

    Args:
        url: ``redis://[:password@]host:port/0``, ``rediss://...`` or ``unix:///path``.

    Raises:
        ValueError: a malformed URL.
    """

    def __init__(self, url: str, *, max_records: int) -> None:
        if not url.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError(f"storage must be 'memory' or a redis://, rediss:// or unix:// URL, got {url!r}")
        self._max_records = max_records
        pool = redis.BlockingConnectionPool.from_url(
            url, max_connections=MAX_CONNECTIONS, timeout=TIMEOUT_S, socket_timeout=TIMEOUT_S
        )
        self._redis = redis.Redis(connection_pool=pool)
        self._announce = self._redis.register_script(_ANNOUNCE)
        self._withdraw = self._redis.register_script(_WITHDRAW)
        self._peer_ids = self._redis.register_script(_PEER_IDS)
        self._read = self._redis.register_script(_READ)
        self._count = self._redis.register_script(_COUNT)

    async def announce(self, signed: SignedRecord, record: PeerRecord, lease_s: float) -> None:
        for _ in range(MAX_ATTEMPTS):
            held, version = await self._held(record.peer_id)
            retired = () if held is None else check_announced(record, held)
            model = _model(record.model_key)
            outcome = await self._run(
                self._announce(
                    keys=[_lease(record.peer_id), _ALL, model, model if held is None else _model(held.model_key)],
                    args=[
                        record.peer_id,
                        version,
                        f"{record.sequence}/{record.instance_id}",
                        signed.payload,
                        signed.public_key,
                        signed.signature,
                        _retired_encoder.encode(retired),
                        max(1, round(lease_s * 1000)),
                        self._max_records,
                    ],
                )
            )
            if outcome == b"full":
                raise TableFullError(f"tracker is full: {self._max_records} peers; try again later")
            if outcome == b"taken":
                return
        raise _contended(record.peer_id)

    async def withdraw(self, record: PeerRecord) -> None:
        for _ in range(MAX_ATTEMPTS):
            held, version = await self._held(record.peer_id)
            if held is None:
                return
            check_withdrawn(record, held)
            keys = [_lease(record.peer_id), _ALL, _model(held.model_key)]
            if await self._run(self._withdraw(keys=keys, args=[record.peer_id, version])) == b"taken":
                return
        raise _contended(record.peer_id)

    async def lookup(self, model_key: str | None, *, limit: int | None = None) -> Listing:
        key = _ALL if model_key is None else _model(model_key)
        peer_ids = await self._run(self._peer_ids(keys=[key], args=[limit or 0]))
        leases: list[Lease] = []
        now_s = 0.0
        for start in range(0, len(peer_ids), BATCH):
            batch = peer_ids[start : start + BATCH]
            now_s, found = await self._leases([_lease(peer_id.decode()) for peer_id in batch])
            leases += [lease for lease, _ in found if model_key in (None, lease.model_key)]
        return Listing(leases=leases, now_s=now_s)

    async def count(self) -> int:
        return int(await self._run(self._count(keys=[_ALL])))

    async def aclose(self) -> None:
        await self._redis.aclose(close_connection_pool=True)

    async def _held(self, peer_id: str) -> tuple[Lease | None, bytes]:
        """The live lease of a peer, and its version to compare with; empty if there is none."""
        _, found = await self._leases([_lease(peer_id)])
        return found[0] if found else (None, b"")

    async def _leases(self, keys: list[str]) -> tuple[float, list[tuple[Lease, bytes]]]:
        now_ms, *rows = await self._run(self._read(keys=keys))
        now_s = int(now_ms) / 1000
        try:
            return now_s, [(_decode(row, now_s), bytes(row[5])) for row in rows]
        except (msgspec.DecodeError, ValueError, TypeError) as exc:
            raise StorageDownError("storage holds what no tracker wrote: give it a database of its own") from exc

    async def _run(self, command: Awaitable[_T]) -> Any:
        try:
            return await command
        except (RedisError, OSError, asyncio.TimeoutError) as exc:
            reason = " ".join(str(exc).split())[:200] or type(exc).__name__
            raise StorageDownError(f"storage does not answer: {reason}; try again later") from exc


_ALL = f"{PREFIX}all"


def _lease(peer_id: str) -> str:
    return f"{PREFIX}lease:{peer_id}"


def _model(model_key: str) -> str:
    return f"{PREFIX}model:{model_key}"


def _decode(row: list[Any], now_s: float) -> Lease:
    payload, public_key, signature, retired, at_ms, _, left_ms = cast(
        tuple[bytes, bytes, bytes, bytes, bytes, bytes, int], row
    )
    record = decode_record(payload)
    return Lease(
        signed=SignedRecord(payload=payload, public_key=public_key, signature=signature),
        instance_id=record.instance_id,
        sequence=record.sequence,
        model_key=record.model_key,
        announced_at_s=int(at_ms) / 1000,
        expires_at_s=now_s + left_ms / 1000,
        retired=_retired_decoder.decode(retired),
    )


def _contended(peer_id: str) -> DiscoveryError:
    return StorageDownError(f"peer '{short_id(peer_id)}' announces in several places at once; try again later")
