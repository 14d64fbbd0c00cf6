"""A Redis of our own: on a Unix socket in a folder of its own, nothing kept on disk."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import redis

__all__ = ["RedisServer"]

START_TIMEOUT_S = 20.0


class RedisServer:
    """One ``redis-server`` process (or ``valkey-server``); `restart` comes back empty at the same place."""

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "redis.sock"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"unix://{self._socket}"

    def start(self) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        assert program is not None, "make test-redis needs redis-server: apt install redis-server"
        command = [program, "--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder)]
        command += ["--save", "", "--appendonly", "no", "--daemonize", "no"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        with redis.Redis(unix_socket_path=str(self._socket)) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert self._process.poll() is None, f"redis-server ended with status {self._process.returncode}"
                    assert time.monotonic() < deadline_s, f"redis-server is not up after {START_TIMEOUT_S} s"
                    time.sleep(0.01)

    def clear(self) -> None:
        with redis.Redis(unix_socket_path=str(self._socket)) as client:
            client.flushall()

    def keys(self) -> list[str]:
        with redis.Redis(unix_socket_path=str(self._socket)) as client:
            return sorted(key.decode() for key in client.keys())

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(timeout=10.0)
            self._socket.unlink(missing_ok=True)
