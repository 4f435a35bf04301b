"""Celery's pool for an engine: jobs in, batches across them, and Celery's own tracer per job on its ready answer.

    event loop      on_apply: hand the job to the engine, and come back
    encode threads  open the message, check it, encode it
    device thread   batches
    answers thread  started, limits, tracer (results, retries, callbacks, chords, signals), acknowledgement

Celery's strategy stays what it is, so events, revoking, expiry, countdowns and rate limits do, too.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.concurrency.base import BasePool
from celery.exceptions import SoftTimeLimitExceeded
from celery.worker import state

import tasks
from core.engine import Engine
from core.errors import DeviceFailure, ServerUnavailable
from core.job import MAX_INTERACTIVE_PRIORITY, Call, Job
from workers.fetch import Room
from workers.request import EngineRequest

log = logging.getLogger(__name__)

#: Of the time a worker may take to drain, the part for jobs under way; the rest is for what follows them.
_DRAIN_PART = 0.8

#: Jobs answered together: their results are one write. Bounds what a result waits for its neighbours.
_MAX_TODO = 512


class Held:
    """A job between `on_apply` and its acknowledgement."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.target = target
        self.args = args
        self.on_accepted = options["accept_callback"]
        self.on_success = options["callback"]
        self.on_failure = options["error_callback"]
        self.on_timeout = options["timeout_callback"]
        self.soft_timeout_s: float | None = options.get("soft_timeout")
        self.timeout_s: float | None = options.get("timeout")
        #: None for tasks that are not the engine's, Celery's own for example.
        self.request: EngineRequest | None = getattr(self.on_accepted, "__self__", None)
        self.job: Job | None = None
        #: Raised as the task's own error instead of the engine's answer.
        self.error: Exception | None = None
        self.is_accepted = False

    def terminate(self, signal: Any = None) -> None:
        """Called by Celery for a job that is to stop. A batch under way is not interrupted, its rows are dropped."""
        if self.job:
            self.job.answer.cancel()

    def open_call(self, engine: Engine) -> Call:
        """The message's call. Runs on an encode thread; what it raises is the job's answer."""
        args, kwargs, _ = self.args[3]
        assert self.request
        call: Call = self.request.task.open_call(engine, args, kwargs)
        return call


class EnginePool(BasePool):
    """`worker_pool` of embedq's workers."""

    signal_safe = False
    task_join_will_block = True
    #: Set by the worker before Celery builds the pool.
    engine: Engine

    def on_start(self) -> None:
        """Called by Celery before the first job."""
        #: Told to the answers thread: what to do; None to end.
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._held: set[Held] = set()
        self._lock = threading.Lock()
        #: (when, tie-breaker, what to do), the first due at the front. The answers thread's own.
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._num_due = 0
        self._is_empty = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    def room(self) -> Room:
        """How much to fetch now: what fills the window of each class. Asked by the transport before each fetch.

        A worker whose bulk window is full still takes interactive jobs.
        """
        engine = self.engine
        max_jobs = engine.settings.max_jobs - len(state.requests)
        tokens = {is_bulk: engine.window_tokens - engine.waiting_tokens(is_bulk) for is_bulk in (False, True)}
        if max_jobs <= 0 or tokens[False] <= 0 or not self.active:
            return Room(max_jobs=0)
        is_bulk = tokens[True] > 0
        max_bytes = max(1, int(min(tokens.values() if is_bulk else [tokens[False]]) * engine.encoding.bytes_per_token))
        return Room(max_jobs, max_bytes, 9 if is_bulk else MAX_INTERACTIVE_PRIORITY)

    def on_apply(self, target: Any, args: Any, kwargs: Any, **options: Any) -> Held:
        """Take a job; called on the event loop, so it only hands on."""
        held = Held(target, args, options)
        with self._lock:
            self._held.add(held)
        if not isinstance(held.request, EngineRequest):
            held.request = None
            self._todo.put(partial(self._answer, held))
            return held
        request = held.request
        try:
            held.job = self.engine.submit(
                lambda: held.open_call(self.engine),
                request.priority,
                request.num_bytes,
                lambda: self._todo.put(partial(self._accept, held)),
            )
        except DeviceFailure as error:  # closed or dead: the process is about to end, and the job goes back
            log.warning("a job is not taken: %s", error, extra={"action": "job_refused", "job": request.id})
            self._forget(held)
            return held
        if request.expires_s is not None:
            self._todo.put(partial(self._watch_expiry, held))
        held.job.answer.add_done_callback(lambda answer: self._settled(held, answer))
        return held

    def drop_revoked(self) -> None:
        """Let waiting jobs that were revoked, or have expired, give up their places."""
        with self._lock:
            waiting = [held for held in self._held if held.job and not held.is_accepted]
        for held in waiting:
            self._drop_if_revoked(held)

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Nothing: `Held.terminate` has dropped the job, and no process of its own is to be killed."""

    def grow(self, n: int = 1) -> None:
        """NotImplementedError: there is nothing to grow."""
        raise NotImplementedError("this pool has no size: one device thread runs all jobs; start more workers instead")

    def shrink(self, n: int = 1) -> None:
        """NotImplementedError: there is nothing to shrink."""
        raise NotImplementedError("this pool has no size: one device thread runs all jobs; stop a worker instead")

    def on_stop(self) -> None:
        """Warm shutdown: finish what is in batches, leave the rest to go back to the queue; within a bound."""
        with self._lock:
            waiting = [held for held in self._held if held.job and not held.is_accepted]
        for held in waiting:
            held.terminate()
        timeout_s = self.engine.settings.drain_timeout_s * _DRAIN_PART
        if not self._wait_until_empty(timeout_s):
            with self._lock:
                late = list(self._held)
            log.warning(
                "jobs under way did not end in time and go back to the queue",
                extra={"action": "drain_timeout", "num_jobs": len(late), "seconds": round(timeout_s, 1)},
            )
            for held in late:
                held.terminate()
        self._todo.put(None)
        self._thread.join()

    on_terminate = on_stop

    def _wait_until_empty(self, timeout_s: float) -> bool:
        with self._lock:
            if not self._held:
                return True
            self._is_empty.clear()
        return self._is_empty.wait(timeout_s)

    def _get_info(self) -> dict[str, Any]:
        return {
            "implementation": f"{type(self).__module__}:{type(self).__name__}",
            "max-concurrency": self.limit,
            "jobs": len(self._held),
            "engine": self.engine.stats(),
        }

    def _run(self) -> None:
        """The answers thread: whatever was told meanwhile or is due, again and again."""
        while todo := self._wait():
            self._do_all([do for do in todo if do is not None])
            if None in todo:
                return

    def _wait(self) -> list[Callable[[], None] | None]:
        """Wait until something is told or due; returns what to do, in order. None is for the end."""
        todo = [*self._take_due()]
        with contextlib.suppress(queue.Empty):
            todo.append(self._todo.get(timeout=0 if todo else self._pause_s()))
            while len(todo) < _MAX_TODO:
                todo.append(self._todo.get_nowait())
        return todo or [*self._take_due()] or [_nothing]

    def _do_all(self, todo: list[Callable[[], None]]) -> None:
        """Do it, store the results all together, and only then what follows them: acknowledgements above all."""
        self._after: list[Callable[[], None]] = []
        try:
            with self.app.backend.batch():
                for do in todo:
                    self._try(do)
        except ServerUnavailable as error:
            log.error("jobs are not acknowledged and run again: %s", error, extra={"action": "results_lost"})
            return
        for do in self._after:
            self._try(do)

    def _try(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception:  # one job must not keep the others from being answered
            log.exception("a job could not be answered", extra={"action": "answer_failed"})

    def _take_due(self) -> Iterator[Callable[[], None]]:
        while self._due and self._due[0][0] <= time.monotonic():
            yield heapq.heappop(self._due)[2]

    def _pause_s(self) -> float | None:
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def _in(self, seconds: float, do: Callable[[], None]) -> None:
        self._num_due += 1
        heapq.heappush(self._due, (time.monotonic() + seconds, self._num_due, do))

    def _settled(self, held: Held, answer: Future[Any]) -> None:
        """The engine has answered, or the job was dropped: nobody is to be told of that here."""
        if answer.cancelled() and held.error is None:
            self._forget(held)
        else:
            self._todo.put(partial(self._answer, held))

    def _accept(self, held: Held) -> None:
        """The first rows of a job are in a batch: it has started, and its limits begin to count."""
        if held.is_accepted or (held.job and held.job.answer.cancelled() and held.error is None):
            return
        held.is_accepted = True
        held.on_accepted(os.getpid(), time.monotonic())
        if held.soft_timeout_s:
            self._in(held.soft_timeout_s, partial(self._soft_timeout, held))
        if held.timeout_s:
            self._in(held.timeout_s, partial(self._timeout, held))

    def _answer(self, held: Held) -> None:
        """Run Celery's tracer on a job whose answer is there."""
        self._accept(held)
        try:
            with tasks.ready_answer(self._ready(held)):
                outcome = held.target(*held.args)
        except Exception:  # not of the task, whose errors the tracer keeps: of the message itself
            self._after.append(partial(held.on_failure, ExceptionInfo()))
        else:
            self._after.append(partial(held.on_success, outcome))
        self._after.append(partial(self._forget, held))

    def _ready(self, held: Held) -> Future[Any] | None:
        if held.error is None:
            return held.job.answer if held.job else None
        failed: Future[Any] = Future()
        failed.set_exception(held.error)
        return failed

    def _soft_timeout(self, held: Held) -> None:
        if held.job and not held.job.is_over:
            held.error = SoftTimeLimitExceeded(held.soft_timeout_s)
            if held.job.answer.cancel():
                held.on_timeout(True, held.soft_timeout_s)
            else:
                held.error = None  # the answer came in this moment

    def _timeout(self, held: Held) -> None:
        if held.job and held.job.answer.cancel():
            # Celery answers, acknowledges and tells; not within a batch of results, that would acknowledge first.
            self._after.append(partial(held.on_timeout, False, held.timeout_s))

    def _watch_expiry(self, held: Held) -> None:
        assert held.request
        seconds = max(0.0, (held.request.expires_s or 0.0) - time.time())
        self._in(seconds, lambda: self._after.append(partial(self._drop_if_revoked, held)))

    def _drop_if_revoked(self, held: Held) -> None:
        """Answer a waiting job with REVOKED, if it was revoked or has expired, and free its place."""
        assert held.request
        if held.is_accepted or (held.job and held.job.is_over):
            return
        if held.request.revoked():
            held.terminate()

    def _forget(self, held: Held) -> None:
        with self._lock:
            self._held.discard(held)
            if not self._held:
                self._is_empty.set()


def _nothing() -> None:
    """What is to do when a wait ended early."""
