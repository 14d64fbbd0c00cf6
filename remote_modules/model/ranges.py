"""Reading byte ranges of a file on the hub: each answer checked, interruptions continued a bounded number of times.

Requests go through `huggingface_hub`'s session, so proxies, certificates, tokens, timeouts and ``HF_ENDPOINT`` are as
the user set them for it. httpx takes the token off when the hub redirects to another host.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, get_session
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # lazy

from remote_modules.errors import CheckpointError, first_line

__all__ = ["HTTP_ERROR", "NoRangesError", "RemoteFile", "find_remote"]

logger = logging.getLogger(__name__)

# Base of all errors of the HTTP library, which huggingface_hub does not export: httpx, or httpx2 in later releases.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

_RETRY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_MAX_RETRY_AFTER_S = 60.0
_PROGRESS_BYTES = 1 << 20  # an attempt that brought so much does not count as failed
_RETRIED = frozenset({408, 429, 502, 503, 504})
_REFUSED = frozenset({401, 403, 404, 410})  # asking for the whole file would not help
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class NoRangesError(Exception):
    """The server does not serve ranges of this file; only the whole can be had."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One version of a file on the hub.

    Attributes:
        etag: what the hub calls this version; answers of another are refused.
        size: bytes.
        token: as `build_hf_headers` takes it; None sends the one that the user is logged in with.
    """

    url: str
    etag: str
    size: int
    token: str | None = None

    def read(self, start: int, end: int) -> bytes:
        return b"".join(self.stream(start, end))

    def stream(self, start: int, end: int) -> Generator[bytes, None, None]:
        """The bytes ``start:end``, in pieces as they arrive; exactly so many, or an error.

        Raises:
            NoRangesError: the server answers with something else than the range.
            CheckpointError: the file changed, or answers keep ending early.
            HTTP_ERROR: refused, or out of retries.
        """
        at, failures = start, _Failures()
        while at < end:
            began, error = at, None
            try:
                for piece in self._answer(at, end):
                    at += len(piece)
                    yield piece
            except HTTP_ERROR as exc:
                error = exc
            if at < end:
                if at - began >= _PROGRESS_BYTES:
                    failures = _Failures()
                failures.wait_or_raise(error or CheckpointError(f"answers for bytes {start}:{end} end at byte {at}"))

    def _answer(self, start: int, end: int) -> Generator[bytes, None, None]:
        headers = build_hf_headers(token=self.token)
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
        timeout_s = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", self.url, headers=headers, timeout=timeout_s, follow_redirects=True
        ) as response:
            if response.status_code in _RETRIED | _REFUSED:
                hf_raise_for_status(response)
            self._check(response, start, end)
            left = end - start
            for piece in response.iter_raw():
                left -= len(piece)
                if left < 0:
                    raise CheckpointError(f"more than the bytes {start}:{end} came that were asked for")
                yield piece

    def _check(self, response: Any, start: int, end: int) -> None:
        """``response``: of httpx, or httpx2 in later releases."""
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if (
            response.status_code != 206
            or found is None
            or response.headers.get("Content-Encoding", "identity") != "identity"
        ):
            raise NoRangesError(f"status {response.status_code} to a request for bytes {start}:{end}")
        if found[3] not in ("*", str(self.size)):
            raise CheckpointError(f"the file has {found[3]} bytes now, it had {self.size}")
        if (int(found[1]), int(found[2])) != (start, end - 1):
            raise NoRangesError(f"bytes {found[1]}-{found[2]} to a request for bytes {start}-{end - 1}")
        etag = _etag_of(response)
        if etag not in (None, self.etag):
            raise CheckpointError(f"the file changed while it was read: version '{etag}', it was '{self.etag}'")


class _Failures:
    """Counts failed attempts in a row."""

    def __init__(self) -> None:
        self._count = 0

    def wait_or_raise(self, error: Exception) -> None:
        """Wait for the next attempt, or raise ``error`` if it is final or the last one allowed."""
        response = getattr(error, "response", None)  # of errors that are answers
        if response is not None and response.status_code not in _RETRIED:
            raise error
        if self._count == len(_RETRY_DELAYS_S):
            raise error
        delay_s = _RETRY_DELAYS_S[self._count]
        if response is not None and (asked := response.headers.get("Retry-After", "")).isdecimal():
            delay_s = min(max(delay_s, float(asked)), _MAX_RETRY_AFTER_S)
        self._count += 1
        logger.info("download interrupted, attempt %d in %.1f s: %s", self._count + 1, delay_s, first_line(error))
        time.sleep(delay_s)


def find_remote(url: str, token: str | None) -> RemoteFile | None:
    """Ask the hub for size and version of a file; None if it does not say both.

    Raises:
        HTTP_ERROR: refused, or out of retries.
    """
    failures = _Failures()
    while True:
        try:
            found = get_hf_file_metadata(url, token=token)
        except HTTP_ERROR as exc:
            failures.wait_or_raise(exc)
        else:
            return RemoteFile(url, found.etag, found.size, token) if found.etag and found.size else None


def _etag_of(response: Any) -> str | None:
    """The hub's name of the version that an answer is of; a store that the hub redirects to has names of its own."""
    for one in (*response.history, response):
        if etag := one.headers.get("X-Linked-Etag"):
            return _bare(etag)
    etag = response.headers.get("ETag")
    return _bare(etag) if etag and not response.history else None


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')
