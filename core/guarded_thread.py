"""A daemon thread whose unexpected end is logged, counted and acted upon.

Python ends a thread that raises with a traceback on standard error, and the rest of the process goes on as if it were
there: jobs would wait for ever, with their leases renewed.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable

log = logging.getLogger(__name__)

#: Unexpected ends of threads in this process since its start, by the thread's name; 0 for one that never ended so.
num_ends: Counter[str] = Counter()
_counting = threading.Lock()

#: Seconds before a thread is restarted: one that fails at once must not take a whole core.
_PAUSE_S = 0.1


class GuardedThread(threading.Thread):
    """Runs `work` once. If that raises, it is run again up to `max_restarts` times, then `on_broken` is called."""

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        on_broken: Callable[[str], None] | None = None,
        max_restarts: int | None = 0,
    ) -> None:
        """`on_broken` gets the reason, on this thread. `max_restarts` is None for as often as it takes."""
        super().__init__(name=name, daemon=True)
        self._work = work
        self._on_broken = on_broken
        self._max_restarts = max_restarts
        with _counting:
            num_ends[name] += 0
        #: Whether it ended unexpectedly and was not restarted.
        self.is_broken = False

    def run(self) -> None:
        num_raised = 0
        while True:
            try:
                self._work()
                return
            except BaseException as error:
                num_raised += 1
                if self._max_restarts is not None and num_raised > self._max_restarts:
                    self._break(error)
                    return
                self._log(error, "a thread ended unexpectedly and is restarted", "thread_restarted")
            time.sleep(_PAUSE_S)

    def _break(self, error: BaseException) -> None:
        self.is_broken = True
        try:
            self._log(error, "a thread ended unexpectedly", "thread_broken")
        finally:
            if self._on_broken is not None:
                self._on_broken(f"the thread {self.name} ended unexpectedly with {type(error).__name__}")

    def _log(self, error: BaseException, message: str, action: str) -> None:
        # Without the error's own words, which may quote a text.
        with _counting:
            num_ends[self.name] += 1
        where = "".join(traceback.format_tb(error.__traceback__))
        fields = {
            "action": action,
            "worker_thread": self.name,
            "num_ends": num_ends[self.name],
            "error": type(error).__name__,
        }
        log.critical("%s, at:\n%s", message, where, extra=fields)
