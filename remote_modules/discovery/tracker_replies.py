"""How trackers, and peers that are asked for others, read a request and answer it: always with one line of JSON."""

from __future__ import annotations

import asyncio
import math
from random import Random

import msgspec
from aiohttp import web

from remote_modules.discovery.storage import StorageDownError
from remote_modules.discovery.tracker_client import Refusal
from remote_modules.errors import DiscoveryError
from remote_modules.peers import SignedRecord
from remote_modules.plan.leases import DuplicateIdentityError, StaleRecordError, TableFullError

__all__ = ["answer", "read_signed", "refuse", "refuse_overload", "reply_to_error"]

_rng = Random()
BODY_TIMEOUT_S = 10.0  # for one request body: a slow sender holds a connection no longer
FULL_RETRY_S = 30.0  # a full table has room again when leases end
DOWN_RETRY_S = 2.0  # a storage that restarts

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(SignedRecord)


async def read_signed(request: web.Request) -> SignedRecord:
    """The record in the body, not verified.

    Raises:
        asyncio.TimeoutError: the body did not arrive in time.
        msgspec.DecodeError: it is none.
    """
    if request.content.is_eof():  # all there: nothing to wait for, and no task to wait with
        return _decoder.decode(await request.read())
    return _decoder.decode(await asyncio.wait_for(request.read(), BODY_TIMEOUT_S))


def answer(value: object) -> web.Response:
    return web.Response(body=_encoder.encode(value), content_type="application/json")


def refuse(status: int, error: str) -> web.Response:
    return web.Response(status=status, body=_encoder.encode({"error": error}), content_type="application/json")


def refuse_overload(reason: str, wait_s: float, *, status: int = 429) -> web.Response:
    """Come back later; how much later differs from one to the next, or all would come at once again."""
    after_s = max(1, math.ceil(wait_s * _rng.uniform(1.0, 2.0)))
    response = refuse(status, f"{reason}; try again in {after_s} s")
    response.headers["Retry-After"] = str(after_s)
    return response


def reply_to_error(exc: Exception) -> web.Response:
    """The refusal that says what was wrong, with the proof if there is one."""
    if isinstance(exc, asyncio.TimeoutError):
        response = refuse(408, f"body did not arrive within {BODY_TIMEOUT_S} s")
        response.force_close()
        return response
    if isinstance(exc, StaleRecordError):
        is_duplicate = isinstance(exc, DuplicateIdentityError)
        refusal = Refusal(error=str(exc), is_duplicate=is_duplicate, newest=exc.newest)
        return web.Response(status=409, body=_encoder.encode(refusal), content_type="application/json")
    if isinstance(exc, TableFullError | StorageDownError):
        wait_s = FULL_RETRY_S if isinstance(exc, TableFullError) else DOWN_RETRY_S
        return refuse_overload(str(exc).removesuffix("; try again later"), wait_s, status=503)
    return refuse(409 if isinstance(exc, DiscoveryError) else 400, str(exc))
