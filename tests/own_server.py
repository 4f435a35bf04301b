"""A server of a test's own: to count its commands, to stop it, to start it again on the same port."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import redis

from embedq.workers.embedded import _free_port, find_program
from tests.running import Running


class OwnServer:
    """Valkey with the append-only file on; a context manager."""

    def __init__(self, directory: Path, **options: str) -> None:
        """`options` are the server's own."""
        self.port = _free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory, self._options = directory, options
        self.client = redis.Redis.from_url(self.url)
        self.start()

    def __enter__(self) -> OwnServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.kill()

    def start(self) -> None:
        """Start it, with what its append-only file holds."""
        options = {"port": self.port, "dir": self._directory, "bind": "127.0.0.1", "appendonly": "yes", "save": ""}
        arguments = [part for name, value in (options | self._options).items() for part in (f"--{name}", str(value))]
        self._running = Running([find_program(), *arguments])
        self._running.wait_for("Ready to accept connections")

    def kill(self) -> None:
        """End it like a crash does."""
        self._running.process.send_signal(signal.SIGKILL)
        try:
            self._running.wait(10)
        except subprocess.TimeoutExpired:  # pragma: no cover - nothing outlives SIGKILL for that long
            raise AssertionError("the server is still there") from None

    def count(self, command: str) -> int:
        """How often it ran `command` so far, also from within scripts."""
        stats: Any = self.client.info("commandstats")
        return int(stats.get(f"cmdstat_{command}", {"calls": 0})["calls"])
