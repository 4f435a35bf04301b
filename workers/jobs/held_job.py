"""The jobs a worker holds: each with Celery's callbacks and the engine's answer, all of them with what they leave room for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, Protocol

from celery.worker import state

from embedq.core.batching.job import MAX_INTERACTIVE_PRIORITY, Call, Job
from embedq.core.engine import Engine
from embedq.tasks.maps import MapTask
from embedq.tasks.speeds import Load
from embedq.workers.context import Room
from embedq.workers.jobs.answer_thread import Timer
from embedq.workers.monitoring.job_counters import Counts, JobCounts
from embedq.workers.parts.part_run import PartRun
from embedq.workers.parts.part_threads import PartThreads


class JobRequest(Protocol):
    """The part of Celery's request that the pool uses; only an `EngineRequest` has size, priority and expiry."""

    id: str
    task: Any
    request_dict: dict[str, Any]
    delivery_info: dict[str, Any] | None
    num_bytes: int

    @property
    def is_reported(self) -> bool:
        """True if its sender knows that a job may say that it has started."""
        ...

    @property
    def is_leased(self) -> bool:
        """False once another worker holds it."""
        ...

    @property
    def priority(self) -> int:
        """0 interactive to 9 bulk."""
        ...

    @property
    def expires_s(self) -> float | None:
        """The moment from which it is no longer wanted, as `time.time()` counts; None for never."""
        ...

    def revoked(self) -> bool:
        """Answer it with REVOKED if it was revoked or has expired; returns whether it was."""
        ...

    def reject(self, requeue: bool = False) -> None:
        """Give it back to its queue, or bury it."""
        ...


class HeldJob:
    """A job between `on_apply` and its acknowledgement: Celery's callbacks, and the engine's job."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.target = target
        self.args = args
        self.on_accepted = options["accept_callback"]
        self.on_success = options["callback"]
        self.on_failure = options["error_callback"]
        self.on_timeout = options["timeout_callback"]
        self.soft_timeout_s: float | None = options.get("soft_timeout")
        self.timeout_s: float | None = options.get("timeout")
        #: Celery's bookkeeping of it, which the callbacks are methods of.
        self.request: JobRequest = self.on_accepted.__self__
        #: None for tasks that are not the engine's, Celery's own for example.
        self.job: Job | PartRun | None = None
        #: Raised as the task's own error instead of the engine's answer.
        self.error: Exception | None = None
        self.is_accepted = False
        #: `time.monotonic()` when its first batch began, and when its progress was reported last; 0 before that.
        self.started_s, self.reported_s = 0.0, 0.0
        #: The progress that was reported last.
        self.reported: tuple[int, int] | None = None
        #: Whether its time limits are kept here: a job of the engine's. Celery keeps none in this pool.
        self.is_timed = False
        #: Whether it is over for the pool: acknowledged, given back or dropped.
        self.is_forgotten = False
        self.timers: list[Timer] = []

    @property
    def is_engines(self) -> bool:
        """True if the engine computes it; Celery's maps of other tasks, for example, it does not."""
        task = self.request.task
        return not isinstance(task, MapTask) or task.is_engines(self.args[3][1])

    @property
    def waits(self) -> bool:
        """True while none of it is computed."""
        return self.job is not None and not self.job.is_over and not self.is_accepted

    @property
    def is_running(self) -> bool:
        """True while the engine computes it."""
        return self.is_timed and self.is_accepted and self.job is not None and not self.job.is_over

    @property
    def progress(self) -> tuple[int, int]:
        """Rows that are computed, and all rows; (0, 0) before its call is opened."""
        return self.job.progress if self.job else (0, 0)

    @property
    def is_news(self) -> bool:
        """True if its progress is another than was reported, its sender wants to know, and it is this worker's to report."""
        return self.reported != self.progress and self.request.is_reported and self.request.is_leased

    @property
    def queue(self) -> str:
        """The queue it came through."""
        return str((self.request.delivery_info or {}).get("routing_key") or "")

    def terminate(self, signal: Any = None) -> None:
        """Stop the job. Celery calls it. A running batch is not interrupted; the job's rows are dropped."""
        if self.job:
            self.job.answer.cancel()

    def open_call(self, engine: Engine) -> Call:
        """Open the message's call. Runs on an encode thread; what it raises is the job's answer."""
        _, _, fields, (args, kwargs, _), *_ = self.args
        call: Call = self.request.task.open_call(engine, args, kwargs)
        fields["embedq_call"] = self.request.task.fingerprint(args, kwargs)  # stored with the result
        return call

    def answer(self) -> Future[Any] | None:
        """The future of what its task returns or raises; None for a task that computes it itself."""
        if self.error is None:
            return self.job.answer if self.job else None
        failed: Future[Any] = Future()
        failed.set_exception(self.error)
        return failed


class HeldJobs:
    """The jobs of one worker between `on_apply` and their acknowledgement. Thread-safe."""

    def __init__(self, engine: Engine, process: str = "") -> None:
        """`process` names this worker to whoever looks at a dataset."""
        self.engine = engine
        self.parts = PartThreads(engine, process)
        self.counts = Counts()
        self.job_counts = JobCounts(engine.models)
        #: False before the pool has started, and once it closes: nothing is fetched then.
        self.is_open = False
        self._lock = threading.Lock()
        self._is_empty = threading.Condition(self._lock)
        self._jobs: set[HeldJob] = set()
        #: Ends cancelled jobs and returns what each was found as; the pool sets it.
        self.on_cancelled: Callable[[Collection[str]], dict[str, str]] = lambda ids: {}
        #: Whether jobs that the engine has answered can be answered to their producers; the pool sets it.
        self.is_answering: Callable[[], bool] = lambda: True

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def is_alive(self) -> bool:
        """True while every thread is there that a job needs, and no pass hangs. Leases are renewed only then."""
        return self.engine.is_alive and self.is_answering()

    def room(self) -> Room:
        """Returns the room for jobs: what fills the window of each class. Asked by the transport before each fetch.

        A worker whose bulk window is full still takes interactive jobs. Jobs that wait for their countdown do not count
        until there are `max_jobs` of them.
        """
        engine = self.engine
        self.counts.num_turns += 1
        num_delayed = len(state.scheduled_requests)
        max_delayed = max(0, engine.settings.max_jobs - num_delayed)
        max_jobs = engine.settings.max_jobs - len(state.requests) + min(num_delayed, engine.settings.max_jobs)
        tokens = {is_bulk: engine.window_tokens - engine.waiting_tokens(is_bulk) for is_bulk in (False, True)}
        if max_jobs <= 0 or tokens[False] <= 0 or not self.is_open:
            return Room(max_jobs=0)
        takes_bulk = tokens[True] > 0
        max_tokens = min(tokens.values()) if takes_bulk else tokens[False]
        max_bytes, batch_bytes = (
            max(1, int(num_tokens * engine.encoding.bytes_per_token))
            for num_tokens in (max_tokens, engine.backlog.largest_budget)
        )
        max_priority = 9 if takes_bulk else MAX_INTERACTIVE_PRIORITY
        return Room(max_jobs, max_bytes, max_priority, batch_bytes, max_delayed, self.parts.room())

    def load(self) -> Load:
        """The work that waits in the engine at this moment."""
        engine = self.engine
        by_class = engine.waiting_tokens(False), engine.waiting_tokens(True)
        return Load(
            {alias: float(tokens) for alias, tokens in engine.waiting_by_model().items()},
            round(by_class[0] / max(1, sum(by_class)), 3),
            float(engine.backlog.largest_budget) if self._jobs else 0.0,
        )

    def cancel(self, ids: Collection[str]) -> dict[str, str]:
        """Free the places of cancelled jobs; returns "running" or "waiting" for each that is here. On the event loop."""
        state.revoked.update(ids)  # also those that Celery gets only now
        return self.on_cancelled(ids)

    def running(self) -> list[str]:
        """Ids of the jobs that stay here when a connection breaks: all that the engine has will be answered."""
        return [held.request.id for held in self.all()]

    def all(self) -> list[HeldJob]:
        """The jobs held at this moment."""
        with self._lock:
            return list(self._jobs)

    def add(self, held: HeldJob) -> None:
        """Hold one more."""
        with self._lock:
            self._jobs.add(held)
            self.counts.holds(True)

    def discard(self, held: HeldJob) -> None:
        """Hold it no longer: it was acknowledged or given back, or is dropped."""
        with self._lock:
            self._jobs.discard(held)
            self.counts.holds(bool(self._jobs))
            if not self._jobs:
                self._is_empty.notify_all()

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Wait until none is held, `timeout_s` at most; returns whether none is."""
        with self._lock:
            return self._is_empty.wait_for(lambda: not self._jobs, timeout_s)
