"""Says whether a worker lives and whether it takes jobs, to whoever supervises it.

    live     no restart needed: 503 once the engine holds work and nothing of it makes progress
    ready    takes jobs: 503 while models load, while the server is away, and once it drains

Reads what the engine and the pool count anyway; no job passes through here.
"""

from __future__ import annotations

import threading
import time
from typing import Any, ClassVar

from celery import bootsteps

from embedq.workers.celery_private import Consumer
from embedq.workers.context import READY, WAITING, Lifecycle, WorkerContext
from embedq.workers.monitoring.job_counters import JobsOfWorker


class Health:
    """The health of this process: loading until `serves` is called."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self.lifecycle = lifecycle
        #: The worker's name and the jobs it holds; empty and None until its models are loaded.
        self.worker = ""
        self.jobs: JobsOfWorker | None = None
        self._lock = threading.Lock()
        #: What the engine had done when it was last seen to make progress, and when that was.
        self._seen: tuple[float, ...] = ()
        self._seen_s = time.monotonic()

    def serves(self, worker: str, jobs: JobsOfWorker) -> None:
        """The models are loaded: from now on progress is looked for in `jobs`."""
        self.worker, self.jobs = worker, jobs

    def live(self) -> tuple[bool, str]:
        """Returns True if the engine makes progress or has nothing to do, with the state; else False and why."""
        jobs, state = self.jobs, self.lifecycle.state
        if jobs is None:
            return True, state
        if not jobs.engine.is_alive:
            return False, "a forward pass hangs, or the device was given up"
        if not jobs.is_alive:
            return False, "a thread that jobs need ended unexpectedly"
        still_s = self._standstill_s(jobs)
        if still_s > jobs.engine.settings.hang_timeout_s:
            return False, f"{len(jobs)} jobs are held and none of them has made progress for {still_s:.0f} s"
        return True, state

    def ready(self) -> tuple[bool, str]:
        """Returns True if it takes jobs, and the state."""
        return self.lifecycle.state == READY, self.lifecycle.state

    def _standstill_s(self, jobs: JobsOfWorker) -> float:
        """Seconds since it was last seen to make progress, or to have nothing to do.

        A standstill begins with the first call that sees it, so only a worker that is probed can have one. While the
        server is away, results wait for it, and to end the worker would only lose them.
        """
        engine, totals = jobs.engine, jobs.engine.backlog.totals
        done = (
            engine.meter.progressed_s,
            totals.num_sequences,
            engine.waiting_tokens(False),
            engine.waiting_tokens(True),
            jobs.job_counts.num_ended,
        )
        now_s = time.monotonic()
        with self._lock:
            if not len(jobs) or self.lifecycle.state == WAITING or done != self._seen:
                self._seen, self._seen_s = done, now_s
            return now_s - self._seen_s


class Readiness(bootsteps.StartStopStep):
    """Consumer step: a worker is ready between its subscription to the queues and the loss of it."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    context: ClassVar[WorkerContext]

    def __init__(self, consumer: Consumer, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._lifecycle = self.context.lifecycle

    def start(self, consumer: Consumer) -> None:
        """Called again after each reconnect."""
        self._lifecycle.state = READY

    def stop(self, consumer: Consumer) -> None:
        """The connection is lost, or the worker ends; a worker that drains stays so."""
        if self._lifecycle.state == READY:
            self._lifecycle.state = WAITING


def readiness_for(context: WorkerContext) -> type[Any]:
    """The consumer step that Celery is to build for this worker."""
    return type("Readiness", (Readiness,), {"context": context})
