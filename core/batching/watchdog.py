"""Detects a forward pass that never ends: a driver that hangs raises no error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from embedq.core.guarded_thread import GuardedThread

#: Checks per limit: a hung pass is detected at most a quarter of the limit late.
_LOOKS_PER_LIMIT = 4


class Watchdog:
    """Calls `on_hung` once if a pass runs for more than `limit_s` without progress."""

    def __init__(self, limit_s: float, on_hung: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._on_hung = on_hung
        self._since_s: float | None = None
        self._closed = threading.Event()
        GuardedThread("watchdog", self._run, max_restarts=None).start()

    def progress(self, is_busy: bool) -> None:
        """Record that a pass began or ended; `is_busy`: whether one runs now."""
        self._since_s = time.monotonic() if is_busy else None

    @property
    def is_hung(self) -> bool:
        """True if the running pass has taken longer than the limit."""
        since_s = self._since_s
        return since_s is not None and time.monotonic() - since_s > self._limit_s

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._limit_s / _LOOKS_PER_LIMIT):
            if self.is_hung:
                self._closed.set()  # once, even if it raises
                self._on_hung()
