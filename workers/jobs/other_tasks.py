"""The thread that runs the tasks which are not the engine's: Celery's own, and an application's that came to our queues.

    answers thread      started
    this thread         the task, its result stored
    answers thread      acknowledgement

A task may take as long as it likes: on the answers thread, a map of 4,000 texts kept every other job's answer waiting
for a minute. These tasks wait for each other, and nobody waits for them.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable

from embedq.core.guarded_thread import GuardedThread

log = logging.getLogger(__name__)

Action = Callable[[], None]


class OtherTasksThread:
    """Runs submitted actions one after another. Begins with the first of them: most workers never have one."""

    def __init__(self, on_broken: Callable[[str], None]) -> None:
        """`on_broken` gets the reason if the thread ends unexpectedly: nobody would run what waits for it."""
        self._on_broken = on_broken
        self._submitted: queue.SimpleQueue[Action] = queue.SimpleQueue()
        self._thread: GuardedThread | None = None

    def submit(self, action: Action) -> None:
        """Run `action` after those submitted before. Only the event loop may call it."""
        self._submitted.put(action)
        if self._thread is None:
            # A daemon: what still runs as the worker ends was not acknowledged, and runs again elsewhere.
            self._thread = GuardedThread("other-tasks", self._run, self._on_broken)
            self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                self._submitted.get()()
            except Exception:  # one of them must not keep the others from being run
                log.exception("a task of another application could not be run", extra={"action": "other_task_failed"})
