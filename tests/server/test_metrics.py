from __future__ import annotations

from remote_modules.server.metrics import peer_metrics


def test_peer_without_blocks_shows_zeros() -> None:
    text = peer_metrics(lambda: None, lambda: 3)().decode()
    lines = {line for line in text.splitlines() if not line.startswith("#")}
    assert {"remote_modules_sessions 0.0", 'remote_modules_requests{kind="copy"} 0.0'} <= lines
    assert len(lines) == 14 + 5 + 3
