"""Batches' outputs -> jobs' rows -> answers, on a thread of its own, so that the device need not wait for it.

What callers attach to an answer runs here too; it must be short.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

#: Batches computed and not yet delivered; beyond it the device waits. Their rows are all that is held.
_MAX_UNDELIVERED = 8


class CompletionThread:
    """Runs what it is given, in order."""

    def __init__(self) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._room = threading.BoundedSemaphore(_MAX_UNDELIVERED)
        self._thread = threading.Thread(target=self._run, name="completion", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> None:
        """Let `work` be done after all that was submitted before; blocks while too much waits."""
        self._room.acquire()
        self._todo.put(work)

    def close(self) -> None:
        """Do what waits, then end the thread."""
        self._todo.put(None)
        self._thread.join()

    def _run(self) -> None:
        while work := self._todo.get():
            try:
                work()
            except Exception:  # a callback of the application; the next jobs must be answered
                log.exception("a callback of a job failed", extra={"action": "callback_failed"})
            finally:
                self._room.release()
