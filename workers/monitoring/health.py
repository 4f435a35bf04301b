"""Whether a worker lives and whether it takes jobs: what a supervisor asks, and what it is told.

    live     not ended for its own good: 503 once the engine holds work and nothing of it gets on
    ready    takes jobs: 503 while models load, while the server is away, and once it drains

Reads what the engine and the pool count anyway; nothing of a job's way comes by here.
"""

from __future__ import annotations

import threading
import time
from typing import Any, ClassVar

from celery import bootsteps

#: What `Health.state` may be.
LOADING, READY, WAITING, DRAINING = "loading", "ready", "waiting for the server", "draining"


class Health:
    """The state of this process."""

    def __init__(self) -> None:
        self.state = LOADING
        #: Its name and its `EnginePool`; None until its models are loaded.
        self.worker = ""
        self.pool: Any = None
        self._lock = threading.Lock()
        #: What the engine had done when it was last seen to get on, and when that was.
        self._seen: tuple[float, ...] = ()
        self._seen_s = time.monotonic()

    def live(self) -> tuple[bool, str]:
        """Whether the engine gets on, or has nothing to do; and why not."""
        if self.pool is None:
            return True, self.state
        engine = self.pool.engine
        if not engine.is_alive:
            return False, "a forward pass hangs, or the device was given up"
        still_s = self._standstill_s()
        if still_s > engine.settings.hang_timeout_s:
            return False, f"{self.pool.num_held} jobs are held and nothing of them has got on for {still_s:.0f} s"
        return True, self.state

    def ready(self) -> tuple[bool, str]:
        """Whether it takes jobs."""
        return self.state == READY, self.state

    def _standstill_s(self) -> float:
        """Seconds since it was last seen to get on, or to have nothing to do.

        A standstill begins when it is first looked at: without anybody who looks, nobody needs to know. While the
        server is away, results wait for it, and to end the worker would only lose them.
        """
        engine, totals = self.pool.engine, self.pool.engine.backlog.totals
        done = (
            engine.meter.progressed_s,
            totals.num_sequences,
            engine.waiting_tokens(False),
            engine.waiting_tokens(True),
            self.pool.job_counts.num_ended,
        )
        now_s = time.monotonic()
        with self._lock:
            if not self.pool.num_held or self.state == WAITING or done != self._seen:
                self._seen, self._seen_s = done, now_s
            return now_s - self._seen_s


#: The health of this process.
health = Health()


class Readiness(bootsteps.StartStopStep):
    """Consumer step: a worker is ready between its subscription to the queues and the loss of it."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    told: ClassVar[Health] = health

    def start(self, consumer: Any) -> None:
        """Called again after each reconnect."""
        self.told.state = READY

    def stop(self, consumer: Any) -> None:
        """The connection is lost, or the worker ends; a worker that drains stays so."""
        if self.told.state == READY:
            self.told.state = WAITING
