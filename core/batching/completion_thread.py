"""Delivers computed rows to their jobs and sets the jobs' answers, on a thread of its own: the device need not wait.

Callbacks that callers attach to an answer run here too, so they must be short.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from embedq.core.guarded_thread import GuardedThread

log = logging.getLogger(__name__)

#: Most computed batches that wait for delivery; then the device waits. Bounds the memory of undelivered rows.
_MAX_UNDELIVERED = 8


class CompletionThread:
    """Runs functions one after another on one thread."""

    def __init__(self, on_broken: Callable[[str], None] | None = None) -> None:
        """`on_broken` is called with the reason if the thread ends unexpectedly."""
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._room = threading.BoundedSemaphore(_MAX_UNDELIVERED)
        self._thread = GuardedThread("completion", self._run, on_broken)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while the thread runs, and after `close`; False once it ended unexpectedly."""
        return not self._thread.is_broken

    def submit(self, work: Callable[[], None]) -> None:
        """Queue `work` behind everything submitted before; blocks while too much waits."""
        self._room.acquire()
        self._todo.put(work)

    def close(self) -> None:
        """Run what is queued, then end the thread."""
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while work := self._todo.get():
            try:
                work()
            except Exception:  # a callback of the application; the next jobs must be answered
                log.exception("an application's callback on a job raised", extra={"action": "callback_failed"})
            finally:
                self._room.release()
