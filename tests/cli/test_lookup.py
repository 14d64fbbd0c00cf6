from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from remote_modules.cli.lookup import ModelName, look_up, wait_for_cover
from remote_modules.cli.options import Sources
from remote_modules.errors import DiscoveryError, NoRouteError
from remote_modules.spans import Span
from remote_modules.testing import LocalSwarm

from .program import invoke


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<h1>It works!</h1>")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web_page() -> Iterator[str]:
    """The URL of something that is no tracker."""
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _tracker(url: str) -> Sources:
    return Sources(trackers=(url,), peers=(), mdns=False)


@pytest.fixture
def model(swarm: LocalSwarm) -> ModelName:
    record = look_up(_tracker(swarm.trackers[0]), None)[0]
    return ModelName(name="m", key=record.model_key, num_blocks=record.num_blocks)


def test_tracker_that_answers_html_is_one_line(web_page: str) -> None:
    error = invoke("status", "--tracker", web_page, "--no-mdns").error
    assert f"tracker {web_page} answered text/html instead of JSON" in error


def test_source_that_fails_is_a_warning_when_another_works(swarm: LocalSwarm, web_page: str) -> None:
    outcome = invoke("status", "--tracker", web_page, "--tracker", swarm.trackers[0], "--no-mdns", "--json")
    assert outcome.json["models"]
    (line,) = outcome.err.splitlines()
    assert line.startswith("warning: discovery source fails")


def test_nowhere_to_look_is_one_line() -> None:
    assert "discovery needs at least one source" in invoke("status", "--no-mdns").error


def test_covered_model_needs_no_wait(swarm: LocalSwarm, model: ModelName) -> None:
    wait_for_cover(_tracker(swarm.trackers[0]), model, wait_s=0.0)


def test_missing_blocks_are_named_with_the_command_that_serves_them(swarm: LocalSwarm, model: ModelName) -> None:
    larger = ModelName(name="m", key=model.key, num_blocks=model.num_blocks + 1)
    with pytest.raises(NoRouteError, match=r"no route for blocks 0:9 of 'm'.*serve m --blocks 0:9 --tracker") as caught:
        wait_for_cover(_tracker(swarm.trackers[0]), larger, wait_s=0.0)
    assert caught.value.missing == (Span(0, 9),)


def test_tracker_that_is_down_is_told_at_once(model: ModelName) -> None:
    with pytest.raises(DiscoveryError, match=r"127\.0\.0\.1:9"):
        wait_for_cover(_tracker("http://127.0.0.1:9"), model, wait_s=60.0)
