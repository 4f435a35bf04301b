"""The thread that answers jobs: it runs Celery's tracers and timers, many in a round.

All calls that were submitted during one round run in the next. The results of a round are stored together, and what
must follow them, acknowledgements above all, runs after that. Knows nothing of engines, pools or requests.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import queue
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from embedq.core.errors import ServerUnavailable
from embedq.core.guarded_thread import GuardedThread

log = logging.getLogger(__name__)

#: Calls of one round: bounds how long a result waits for its neighbours.
_MAX_CALLS = 512

#: Cancelled timers that are kept, beyond as many as there are others.
_MAX_CANCELLED = 1_000

#: Longest wait for a timer at once. A message may ask for a limit of any length, and Python waits 292 years at most: asked
#: for more it raises, and the thread would end.
_MAX_PAUSE_S = 3_600.0

Action = Callable[[], None]


class Timer:
    """An action that runs at a time, unless it is cancelled."""

    def __init__(self, due_s: float, action: Action) -> None:
        self.due_s = due_s
        self.action: Action | None = action

    def cancel(self) -> None:
        """Never run the action; what it refers to is freed at once."""
        self.action = None


class AnswersThread:
    """Runs submitted actions in order, and timers when they are due."""

    def __init__(
        self, batch: Callable[[], AbstractContextManager[None]], on_broken: Callable[[str], None] | None = None
    ) -> None:
        """`on_broken` is called with the reason if the thread ends unexpectedly: nobody would answer jobs any more."""
        #: Stores all results of its block as it ends; ServerUnavailable if it cannot.
        self._batch = batch
        self._submitted: queue.SimpleQueue[Action | None] = queue.SimpleQueue()
        #: The first due at the front; the number breaks ties.
        self._timers: list[tuple[float, int, Timer]] = []
        self._number = itertools.count()
        self._num_wanted = _MAX_CANCELLED
        self._after: list[tuple[Action, Action]] = []
        self._thread = GuardedThread("answers", self._run, on_broken)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """True while the thread runs, and after `close`; False once it ended unexpectedly."""
        return not self._thread.is_broken

    def submit(self, action: Action) -> None:
        """Run `action` in the next round. Any thread may call it."""
        self._submitted.put(action)

    def run_later(self, seconds: float, action: Action) -> Timer:
        """Run `action` in `seconds`. Only this thread may call it, as `after_storing`."""
        timer = Timer(time.monotonic() + seconds, action)
        heapq.heappush(self._timers, (timer.due_s, next(self._number), timer))
        return timer

    def after_storing(self, on_stored: Action, on_failure: Action) -> None:
        """Call `on_stored` after this round's results are stored, `on_failure` if that failed."""
        self._after.append((on_stored, on_failure))

    def close(self) -> None:
        """Run what was submitted, then end the thread."""
        self._submitted.put(None)
        self._thread.join()

    def _run(self) -> None:
        is_open = True
        while is_open:
            submitted = self._wait()
            is_open = None not in submitted
            self._run_all([*self._take_due(), *(action for action in submitted if action)])
            self._prune()

    def _wait(self) -> list[Action | None]:
        """The submitted actions in order, None for the end; empty if there are none when a timer may be due."""
        submitted: list[Action | None] = []
        pause_s = min(max(0.0, self._timers[0][0] - time.monotonic()), _MAX_PAUSE_S) if self._timers else None
        with contextlib.suppress(queue.Empty):
            submitted.append(self._submitted.get(timeout=pause_s))
            while len(submitted) < _MAX_CALLS:
                submitted.append(self._submitted.get_nowait())
        return submitted

    def _run_all(self, actions: list[Action]) -> None:
        self._after.clear()
        is_stored = True
        try:
            with self._batch():
                for action in actions:
                    _try(action)
        except ServerUnavailable as error:
            is_stored = False
            log.error("results are lost, their jobs run again: %s", error, extra={"action": "results_lost"})
        for on_stored, on_failure in self._after:
            _try(on_stored if is_stored else on_failure)

    def _take_due(self) -> list[Action]:
        due = []
        while self._timers and self._timers[0][0] <= time.monotonic():
            action = heapq.heappop(self._timers)[2].action
            if action:
                due.append(action)
        return due

    def _prune(self) -> None:
        """Remove cancelled timers once they are the majority: limits of an hour outlive their jobs by an hour."""
        if len(self._timers) > 2 * self._num_wanted:
            self._timers = [entry for entry in self._timers if entry[2].action]
            heapq.heapify(self._timers)
            self._num_wanted = max(_MAX_CANCELLED, len(self._timers))


def _try(action: Action) -> None:
    try:
        action()
    except Exception:  # one job must not keep the others from being answered
        log.exception("a job could not be answered", extra={"action": "answer_failed"})
