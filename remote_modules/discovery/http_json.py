"""Asking a stranger's HTTP server for a little JSON, and believing nothing about the answer.

Used for trackers and for peers' records. No redirects, no decompression, no cookies, no proxy from the
environment, a byte cap that is counted while reading, and one deadline for everything.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import aiohttp

from remote_modules.errors import DiscoveryError

__all__ = ["MAX_ANSWER_BYTES", "Answer", "ask", "make_session", "printable"]

MAX_ANSWER_BYTES = 1024 * 1024
MAX_OPEN = 16  # connections of one session

_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back: any status but a redirect, and a body that claims to be JSON.

    Attributes:
        retry_after_s: of the ``Retry-After`` header, if it is a number of seconds.
    """

    status: int
    body: bytes
    retry_after_s: float | None = None


def make_session(timeout_s: float) -> aiohttp.ClientSession:
    """A session with our limits; call it inside the running loop, and close it."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(limit=MAX_OPEN),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
        auto_decompress=False,
    )


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    *,
    who: str,
    body: bytes | None = None,
    params: dict[str, str] | None = None,
    verify_tls: bool = True,
) -> Answer:
    """GET ``url``, or POST ``body`` to it.

    Args:
        who: the asked in a message, such as ``"tracker http://localhost:8000"``; its first word says what it
        should be.

    Raises:
        DiscoveryError: unreachable, too slow, too long, a redirect, or something else than JSON.
    """
    try:
        async with session.request(
            "GET" if body is None else "POST",
            url,
            data=body,
            params=params,
            headers=None if body is None else {"Content-Type": "application/json"},
            allow_redirects=False,
            ssl=verify_tls,
        ) as response:
            if 300 <= response.status < 400:
                raise DiscoveryError(f"{who} answered with a redirect, which is never followed; use its final URL")
            if response.status == 410:  # Gone: the body is of no interest
                return Answer(status=410, body=b"")
            retry_after_s = _seconds(response.headers.get("Retry-After", ""))
            if response.status in (429, 503) and response.content_type != "application/json":
                return Answer(status=response.status, body=b"", retry_after_s=retry_after_s)  # a proxy's
            if response.content_type != "application/json":
                kind, came = who.partition(" ")[0], printable(response.content_type)
                raise DiscoveryError(
                    f"{who} answered {came} instead of JSON (status {response.status}); "
                    f"is this a remote-modules {kind}?"
                )
            read = await _read(response, who)
            return Answer(status=response.status, body=read, retry_after_s=retry_after_s)
    except asyncio.TimeoutError as exc:
        raise DiscoveryError(f"{who} did not answer within {session.timeout.total} s") from exc
    except (
        aiohttp.ClientError,
        OSError,
        ValueError,
    ) as exc:  # ValueError: a host or URL that cannot be encoded
        reason = printable(str(exc)) or type(exc).__name__
        raise DiscoveryError(f"{who} is unreachable: {reason}") from exc


def printable(text: str) -> str:
    """A stranger's text made fit for a log line: one line, no control characters, at most 200 characters."""
    return "".join(char if char.isprintable() else "?" for char in text[:200])


def _seconds(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


async def _read(response: aiohttp.ClientResponse, who: str) -> bytes:
    received = bytearray()
    claimed = response.content_length or 0
    if claimed <= MAX_ANSWER_BYTES:
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            received += chunk
            if len(received) > MAX_ANSWER_BYTES:
                break
        else:
            return bytes(received)
    response.close()
    raise DiscoveryError(f"{who} answered with more than {MAX_ANSWER_BYTES} bytes; answer dropped")
