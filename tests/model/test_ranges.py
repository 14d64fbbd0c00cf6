from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from model.fake_hub import COMMIT, HUB_NAME, Answer, FakeHub, running, serving
from remote_modules.errors import CheckpointError
from remote_modules.model.ranges import HTTP_ERROR, NoRangesError, RemoteFile, find_remote

NAME = "x.safetensors"
DATA = bytes(range(256)) * 40
ATTEMPTS = 4  # the first and one for each delay of `serving`


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / NAME).write_bytes(DATA)
    with serving(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def remote(hub: FakeHub) -> RemoteFile:
    found = find_remote(url_of(hub), "secret")
    assert found is not None
    hub.answers.clear()
    hub.tokens.clear()
    return found


def url_of(hub: FakeHub) -> str:
    return f"{hub.url}/{HUB_NAME}/resolve/{COMMIT}/{NAME}"


def test_hub_tells_size_and_version(hub: FakeHub, remote: RemoteFile) -> None:
    assert remote == RemoteFile(url_of(hub), hashlib.sha256(DATA).hexdigest(), len(DATA), "secret")


@pytest.mark.parametrize(("start", "end"), [(0, 1), (7, 9), (100, 10_240), (0, 10_240)])
def test_just_the_range_is_sent(hub: FakeHub, remote: RemoteFile, start: int, end: int) -> None:
    assert remote.read(start, end) == DATA[start:end]
    assert hub.ranges == [(start, end)]
    assert hub.sent_bytes() == end - start
    assert hub.tokens == ["Bearer secret"]


def test_empty_range_asks_nothing(hub: FakeHub, remote: RemoteFile) -> None:
    assert remote.read(5, 5) == b""
    assert hub.answers == []


def test_dropped_connection_goes_on_where_it_stopped(hub: FakeHub, remote: RemoteFile) -> None:
    def drop(answer: Answer) -> None:
        answer.cut = 1000 if len(hub.answers) < 2 else None

    hub.tamper = drop
    assert remote.read(100, 5000) == DATA[100:5000]
    assert hub.ranges == [(100, 5000), (1100, 5000), (2100, 5000)]
    assert hub.sent_bytes() == 4900


@pytest.mark.parametrize("length", ["1000", "50"])
def test_connection_that_always_drops_ends_in_an_error(hub: FakeHub, remote: RemoteFile, length: str) -> None:
    def drop(answer: Answer) -> None:
        answer.headers["Content-Length"] = length
        answer.cut = 10

    hub.tamper = drop
    with pytest.raises(HTTP_ERROR):
        remote.read(0, 5000)
    assert len(hub.answers) == ATTEMPTS


def test_answers_that_end_early_without_a_drop_end_in_an_error(hub: FakeHub, remote: RemoteFile) -> None:
    def shorten(answer: Answer) -> None:
        answer.body = answer.body[:10]

    hub.tamper = shorten
    with pytest.raises(CheckpointError, match=r"^answers for bytes 0:5000 end at byte 40$"):
        remote.read(0, 5000)


def test_attempts_that_bring_much_do_not_count(
    hub: FakeHub, remote: RemoteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remote_modules.model.ranges._PROGRESS_BYTES", 500)

    def drop(answer: Answer) -> None:
        answer.cut = 500

    hub.tamper = drop
    assert remote.read(0, 5000) == DATA[:5000]
    assert len(hub.answers) == 10 > ATTEMPTS


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_busy_server_is_asked_again_a_bounded_number_of_times(hub: FakeHub, remote: RemoteFile, status: int) -> None:
    def refuse(answer: Answer) -> None:
        if len(hub.answers) < 2 or is_forever:
            answer.status, answer.body = status, b""

    is_forever = False
    hub.tamper = refuse
    assert remote.read(0, 10) == DATA[:10]
    assert len(hub.answers) == 3
    is_forever = True
    with pytest.raises(HTTP_ERROR):
        remote.read(0, 10)
    assert len(hub.answers) == 3 + ATTEMPTS


def test_server_says_when_to_come_back(hub: FakeHub, remote: RemoteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("remote_modules.model.ranges.time.sleep", waits.append)
    after = ["7", "9999", "soon"]

    def refuse(answer: Answer) -> None:
        if after:
            answer.status, answer.body = 429, b""
            answer.headers["Retry-After"] = after.pop(0)

    hub.tamper = refuse
    assert remote.read(0, 10) == DATA[:10]
    assert waits == [7.0, 60.0, 0.0]


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusal_is_final(hub: FakeHub, remote: RemoteFile, status: int) -> None:
    def refuse(answer: Answer) -> None:
        answer.status, answer.body = status, b"no"

    hub.tamper = refuse
    with pytest.raises(HTTP_ERROR):
        remote.read(0, 10)
    assert len(hub.answers) == 1


@pytest.mark.parametrize("status", [200, 204, 400, 405, 416, 500, 501])
def test_server_without_ranges_is_told_at_once(hub: FakeHub, remote: RemoteFile, status: int) -> None:
    def refuse(answer: Answer) -> None:
        answer.status, answer.body = status, b""

    hub.tamper = refuse
    with pytest.raises(NoRangesError):
        remote.read(0, 10)
    assert len(hub.answers) == 1


@pytest.mark.parametrize(
    "headers",
    [{"Content-Range": "bytes 1-10/10240"}, {"Content-Range": "bytes 0-8/10240"}, {"Content-Range": "x"}]
    + [{"Content-Encoding": "gzip"}],
    ids=str,
)
def test_other_range_than_asked_is_no_range(hub: FakeHub, remote: RemoteFile, headers: dict[str, str]) -> None:
    hub.tamper = lambda answer: answer.headers.update(headers)
    with pytest.raises(NoRangesError):
        remote.read(0, 10)


def test_more_bytes_than_asked_are_refused(hub: FakeHub, remote: RemoteFile) -> None:
    def lengthen(answer: Answer) -> None:
        answer.body += b"x"

    hub.tamper = lengthen
    with pytest.raises(CheckpointError, match=r"^more than the bytes 0:10 came that were asked for$"):
        remote.read(0, 10)


def test_file_of_another_size_is_not_mixed_in(hub: FakeHub, remote: RemoteFile) -> None:
    with pytest.raises(CheckpointError, match=r"^the file has 10240 bytes now, it had 10241$"):
        replace(remote, size=10_241).read(0, 10)


def test_file_of_another_version_is_not_mixed_in(hub: FakeHub, remote: RemoteFile) -> None:
    with pytest.raises(CheckpointError, match=r"^the file changed while it was read: version '.*', it was 'other'$"):
        replace(remote, etag="other").read(0, 10)


def test_redirect_to_another_host_gets_no_token(hub: FakeHub, remote: RemoteFile) -> None:
    with running(FakeHub(hub.folder)) as store:
        store.tamper = lambda answer: answer.headers.update(ETag='"of-the-store"')
        hub.redirect_url = store.url.replace(
            "127.0.0.1", "localhost"
        )  # to huggingface_hub, a port alone is no other host
        found = find_remote(url_of(hub), "secret")
        assert found == remote
        assert found.read(3, 40) == DATA[3:40]
        assert store.tokens == [""]
        assert store.sent_bytes() == 37
        with pytest.raises(CheckpointError, match="the file changed while it was read"):
            replace(found, etag="other").read(3, 40)
    assert set(hub.tokens) == {"Bearer secret"}


def test_hub_without_version_has_no_remote(hub: FakeHub) -> None:
    hub.tamper = lambda answer: answer.headers.update(ETag="")
    assert find_remote(url_of(hub), None) is None


def test_hub_that_is_busy_is_asked_for_the_version_again(hub: FakeHub) -> None:
    def refuse(answer: Answer) -> None:
        if len(hub.answers) < 2:
            answer.status = 503

    hub.tamper = refuse
    found = find_remote(url_of(hub), None)
    assert found is not None
    assert found.size == len(DATA)
    assert len(hub.answers) == 3
