"""The thread on which jobs are answered: whatever it is told, whatever is due, many at a time.

What is told meanwhile is done in one go: its results are stored together, and what must follow
them, acknowledgements above all, is done only then. Knows nothing of engines, pools or requests.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from embedq.core.errors import ServerUnavailable

log = logging.getLogger(__name__)

#: Told things done in one go: bounds what a result waits for its neighbours.
_MAX_TOLD = 512

#: Timers that may be cancelled and still kept, beyond as many as are wanted.
_MAX_CANCELLED = 1_000

Do = Callable[[], None]


class Timer:
    """Something to do later, unless it is cancelled."""

    def __init__(self, due_s: float, do: Do) -> None:
        self.due_s = due_s
        self.do: Do | None = do

    def cancel(self) -> None:
        """Do it never; what it refers to is free at once."""
        self.do = None


class AnswersThread:
    """Runs what it is told, in order, and timers when they are due."""

    def __init__(self, batch: Callable[[], AbstractContextManager[None]]) -> None:
        #: Stores all results of its block as it ends; ServerUnavailable if it cannot.
        self._batch = batch
        self._told: queue.SimpleQueue[Do | None] = queue.SimpleQueue()
        #: The first due at the front; the number breaks ties.
        self._timers: list[tuple[float, int, Timer]] = []
        self._number = itertools.count()
        self._num_wanted = _MAX_CANCELLED
        self._after: list[tuple[Do, Do]] = []
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def tell(self, do: Do) -> None:
        """Let `do` be done soon; for any thread."""
        self._told.put(do)

    def later(self, seconds: float, do: Do) -> Timer:
        """Let `do` be done in `seconds`. On this thread only, as is `after`."""
        timer = Timer(time.monotonic() + seconds, do)
        heapq.heappush(self._timers, (timer.due_s, next(self._number), timer))
        return timer

    def after(self, do: Do, otherwise: Do) -> None:
        """Let `do` be done once the results of this go are stored; `otherwise` if they cannot be."""
        self._after.append((do, otherwise))

    def close(self) -> None:
        """Do what was told, then end."""
        self._told.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            told = self._wait()
            is_open = None not in told
            self._do_all([*self._take_due(), *(do for do in told if do)])
            self._prune()

    def _wait(self) -> list[Do | None]:
        """What was told, in order; None for the end. Empty once a timer is due."""
        told: list[Do | None] = []
        pause_s = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        with contextlib.suppress(queue.Empty):
            told.append(self._told.get(timeout=pause_s))
            while len(told) < _MAX_TOLD:
                told.append(self._told.get_nowait())
        return told

    def _do_all(self, todo: list[Do]) -> None:
        self._after.clear()
        is_stored = True
        try:
            with self._batch():
                for do in todo:
                    _try(do)
        except ServerUnavailable as error:
            is_stored = False
            log.error("jobs are not acknowledged and run again: %s", error, extra={"action": "results_lost"})
        for do, otherwise in self._after:
            _try(do if is_stored else otherwise)

    def _take_due(self) -> list[Do]:
        due = []
        while self._timers and self._timers[0][0] <= time.monotonic():
            do = heapq.heappop(self._timers)[2].do
            if do:
                due.append(do)
        return due

    def _prune(self) -> None:
        """Forget cancelled timers once they are most: limits of an hour outlive their jobs by an hour."""
        if len(self._timers) > 2 * self._num_wanted:
            self._timers = [entry for entry in self._timers if entry[2].do]
            heapq.heapify(self._timers)
            self._num_wanted = max(_MAX_CANCELLED, len(self._timers))


def _try(do: Do) -> None:
    try:
        do()
    except Exception:  # one job must not keep the others from being answered
        log.exception("a job could not be answered", extra={"action": "answer_failed"})
