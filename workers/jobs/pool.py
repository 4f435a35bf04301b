"""Celery's pool for an engine: jobs in, batches across them, and Celery's own tracer per job on its ready answer.

    event loop      on_apply: submit the job to the engine, and return
    encode threads  open the message, check it, encode it
    device thread   batches
    other tasks     those that are not the engine's run on a thread of their own
    answers thread  started, limits, tracer (results, retries, callbacks, chords, signals), acknowledgement

Celery's strategy stays what it is, so events, revoking, expiry, countdowns and rate limits do, too.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from functools import partial
from typing import Any, ClassVar

from billiard.einfo import ExceptionInfo
from celery.exceptions import SoftTimeLimitExceeded
from celery.worker import state
from celery.worker.state import task_ready

from embedq import tasks
from embedq.core.errors import DeviceFailure, InvalidInput, ServerUnavailable
from embedq.tasks.datasets.part_task import PartTask
from embedq.workers.celery_private import PoolBase, RequestBase
from embedq.workers.context import DRAINING, WorkerContext
from embedq.workers.jobs.answer_thread import AnswersThread
from embedq.workers.jobs.held_job import HeldJob, HeldJobs
from embedq.workers.jobs.other_tasks import OtherTasksThread
from embedq.workers.jobs.progress import ProgressReports
from embedq.workers.jobs.request import EngineRequest
from embedq.workers.monitoring.job_counters import outcome_of, times_of

log = logging.getLogger(__name__)

#: Part of `drain_timeout_s` that running jobs have; the rest is for storing their results and closing connections.
_DRAIN_PART = 0.8


class EnginePool(PoolBase):
    """`worker_pool` of embedq's workers: `pool_for` makes the class that Celery builds."""

    signal_safe = False

    context: ClassVar[WorkerContext]
    jobs: ClassVar[HeldJobs]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.engine = self.jobs.engine

    def on_start(self) -> None:
        """Called by Celery before the first job."""
        self._answers = AnswersThread(lambda: self.app.backend.batch(), self.context.end)
        self._others = OtherTasksThread(self.context.end)
        self.jobs.parts.on_broken = self.context.end
        self._progress = ProgressReports(
            self.jobs, self._answers, lambda: self.app.backend, self.context.name, self._end_cancelled
        )
        self.jobs.is_answering = lambda: self._answers.is_alive
        self.jobs.on_cancelled = self.cancel
        self.jobs.is_open = True

    def on_apply(self, target: Any, args: Any, kwargs: Any, **options: Any) -> HeldJob:
        """Take a job. Called on the event loop, so it only submits it."""
        held = HeldJob(target, args, options)
        self.jobs.add(held)
        is_ours = isinstance(held.request, EngineRequest)
        if is_ours and isinstance(held.request.task, PartTask):
            held.is_timed = True
            self._take_part(held)
        elif is_ours and held.is_engines:
            held.is_timed = True
            self._submit(held)
        else:
            self._answers.submit(partial(self._accept, held))
            self._others.submit(partial(self._run_other, held))
        return held

    def drop_revoked(self) -> None:
        """Remove waiting jobs that were revoked or have expired from the engine's backlog."""
        for held in self.jobs.all():
            self._drop_if_revoked(held)

    def cancel(self, ids: Collection[str]) -> dict[str, str]:
        """End jobs that Celery knows as revoked, in whatever state; returns "running" or "waiting" for each that was here.

        Called on the event loop.
        """
        found = {job_id: state.requests[job_id] for job_id in ids if job_id in state.requests}
        if not found:
            return {}
        held = {one.request.id: one for one in self.jobs.all()}
        running = {job_id for job_id in found if job_id in held and held[job_id].is_accepted}
        for job_id, request in found.items():
            try:
                self._cancel(request, held.get(job_id), job_id in running)
            except Exception:  # its answer cannot be stored again; it is computed, and its result refused
                log.exception("a cancelled job cannot be ended", extra={"action": "cancel_failed", "job": job_id})
        return {job_id: "running" if job_id in running else "waiting" for job_id in found}

    def _cancel(self, request: Any, held: HeldJob | None, is_running: bool) -> None:
        if is_running or not isinstance(request, EngineRequest):
            RequestBase.terminate(request, self)
        elif held:
            self._drop_if_revoked(held)
        else:  # it waits for its countdown
            request.unschedule()
            request.revoked()

    def _end_cancelled(self, ids: list[str]) -> None:
        """End cancelled jobs that this worker was not told of, once this round's results are stored."""

        def end() -> None:
            self.jobs.cancel(ids)

        self._answers.after_storing(end, end)

    def terminate_job(self, pid: int, signal: Any = None) -> None:
        """Do nothing: `HeldJob.terminate` has dropped the job, and it has no process that could be killed."""

    def grow(self, n: int = 1) -> None:
        """NotImplementedError: the pool has no size."""
        raise NotImplementedError("this pool has no size: one device thread runs all jobs; start more workers instead")

    def shrink(self, n: int = 1) -> None:
        """NotImplementedError: the pool has no size."""
        raise NotImplementedError("this pool has no size: one device thread runs all jobs; stop a worker instead")

    def on_close(self) -> None:
        """Stop fetching. Celery calls it first in every kind of shutdown."""
        self.jobs.is_open = False
        self.context.lifecycle.state = DRAINING
        # Not on Celery's signal, sent within the signal handler, where it takes a lock: a second SIGTERM in that
        # moment would wait for it for ever.
        log.info(
            "draining: the worker finishes its jobs and takes no more",
            extra={"action": "draining", "num_jobs": len(self.jobs)},
        )

    def on_stop(self) -> None:
        """Warm shutdown: finish the jobs in batches within a bound; the others go back to the queue."""
        timeout_s = self.engine.settings.drain_timeout_s * _DRAIN_PART
        self.jobs.parts.drop_slow(timeout_s)
        self._end(timeout_s)

    def on_terminate(self) -> None:
        """Cold shutdown: unanswered jobs go back to the queue at once."""
        self._end(0.0)

    def _end(self, timeout_s: float) -> None:
        for held in self.jobs.all():
            if held.waits:
                held.terminate()
        self.jobs.wait_until_empty(timeout_s)
        late = self.jobs.all()
        if late:
            log.warning(
                "running jobs did not end in time and go back to the queue",
                extra={"action": "drain_timeout", "num_jobs": len(late), "seconds": round(timeout_s, 1)},
            )
        for held in late:
            held.terminate()
        self._answers.close()

    def inspected(self) -> dict[str, Any]:
        """Return what `inspect stats` shows of the pool: how many jobs it holds, and the engine's own statistics."""
        return {
            "implementation": f"{type(self).__module__}:{type(self).__name__}",
            "max-concurrency": self.engine.settings.max_jobs,  # `celery graph workers` and Flower look for it
            "jobs": len(self.jobs),
            "engine": self.engine.stats(),
        }

    def _submit(self, held: HeldJob) -> None:
        request = held.request
        try:
            held.job = self.engine.submit(
                lambda: held.open_call(self.engine),
                request.priority,
                request.num_bytes,
                lambda: self._answers.submit(partial(self._accept, held)),
                request,
            )
        except DeviceFailure as error:  # closed or dead: the process is about to end, and its jobs return to the queue
            log.warning("the engine refuses a job: %s", error, extra={"action": "job_refused", "job": request.id})
            self._forget(held)
            return
        self._follow(held, held.job.answer)

    def _take_part(self, held: HeldJob) -> None:
        """Submit a part of a dataset to the part threads."""
        request = held.request
        _, kwargs, _ = held.args[3]
        retries_left = (request.task.max_retries or 0) - int(request.request_dict.get("retries") or 0)
        on_started = partial(self._answers.submit, partial(self._accept, held))
        try:
            held.job = self.jobs.parts.take(kwargs, request.id, retries_left, on_started)
        except InvalidInput as error:
            held.error = error
            self._answers.submit(partial(self._answer, held))
            return
        self._follow(held, held.job.answer)

    def _follow(self, held: HeldJob, answer: Future[Any]) -> None:
        """Act on a submitted job's expiry, and on its answer."""
        if held.request.expires_s is not None:
            self._answers.submit(partial(self._watch_expiry, held, held.request.expires_s))
        answer.add_done_callback(lambda done: self._settled(held, done))

    def _settled(self, held: HeldJob, answer: Future[Any]) -> None:
        """Called when the engine has answered, or the job was dropped: then somebody else has answered it."""
        if answer.cancelled() and held.error is None:
            self._forget(held)
        else:
            self._answers.submit(partial(self._answer, held))

    def _accept(self, held: HeldJob) -> None:
        """Start a job for Celery: its first rows are in a batch. Its time limits begin now."""
        if held.is_accepted or held.is_forgotten or (held.job and held.job.answer.cancelled() and held.error is None):
            return
        held.is_accepted, held.started_s = True, time.monotonic()
        held.on_accepted(os.getpid(), held.started_s)
        if held.is_timed:
            self._progress.watch()
        # Not by `held.job`: the first batch may begin before `submit` has returned it, and the job would have no limits.
        if held.is_timed and held.soft_timeout_s:
            held.timers.append(self._answers.run_later(held.soft_timeout_s, partial(self._soft_timeout, held)))
        if held.is_timed and held.timeout_s:
            held.timers.append(self._answers.run_later(held.timeout_s, partial(self._timeout, held)))

    def _answer(self, held: HeldJob) -> None:
        """Run Celery's tracer on a job that the engine has answered."""
        self._accept(held)
        self._after_answer(held, *_traced(held))

    def _run_other(self, held: HeldJob) -> None:
        """Run a task that is not the engine's, and store its result; on the thread of such tasks."""
        try:
            with self.app.backend.batch():
                outcome = _traced(held)
        except ServerUnavailable as error:
            log.error("a result is lost, its job runs again: %s", error, extra={"action": "results_lost"})
            self._answers.submit(partial(self._settle, held, partial(_give_back, held)))
        else:
            self._answers.submit(partial(self._after_answer, held, *outcome))

    def _after_answer(self, held: HeldJob, became: str, done: Callable[[], None]) -> None:
        """Count a job that was traced, and settle it once this round's results are stored."""
        times = times_of(held.job, held.request.task)
        self.jobs.counts.answered(held.queue, times.num_tokens, getattr(held.request, "amount", None))
        stored = partial(self._stored, held, partial(self.jobs.job_counts.stored, times, became, done))
        give_back = partial(_give_back, held)
        self._answers.after_storing(partial(self._settle, held, stored), partial(self._settle, held, give_back))

    def _stored(self, held: HeldJob, then: Callable[[], None]) -> None:
        held.reported_s = 0.0  # its result has taken the place of what was reported
        then()

    def _settle(self, held: HeldJob, do: Callable[[], None]) -> None:
        """Acknowledge a job, or give it back. It is held until then: a reconnect would give it back and it ran again."""
        try:
            do()
        finally:
            self._forget(held)

    def _soft_timeout(self, held: HeldJob) -> None:
        if held.job and not held.job.is_over:
            held.error = SoftTimeLimitExceeded(held.soft_timeout_s)
            if held.job.answer.cancel():
                held.on_timeout(True, held.soft_timeout_s)
            else:
                held.error = None  # the answer came in this moment

    def _timeout(self, held: HeldJob) -> None:
        times = times_of(held.job, held.request.task)  # cancelling forgets the job
        if held.job and held.job.answer.cancel():
            # Not within a batch of results, that would acknowledge first.
            done = partial(_answer_timeout, held)
            self._answers.after_storing(done, done)
            self.jobs.job_counts.count(*times[:2], "failed")

    def _watch_expiry(self, held: HeldJob, expires_s: float) -> None:
        drop = partial(self._drop_if_revoked, held)
        seconds = max(0.0, expires_s - time.time())
        held.timers.append(self._answers.run_later(seconds, lambda: self._answers.after_storing(drop, drop)))

    def _drop_if_revoked(self, held: HeldJob) -> None:
        """Answer a waiting job with REVOKED if it was revoked or has expired, and drop it."""
        if held.waits and held.request.revoked():
            held.terminate()

    def _forget(self, held: HeldJob) -> None:
        for timer in held.timers:
            timer.cancel()
        held.is_forgotten = True
        self._progress.take_back([held])
        held.job = None  # its answer refers back to us: without this, results would stay until a garbage collection
        self.jobs.discard(held)


def _traced(held: HeldJob) -> tuple[str, Callable[[], None]]:
    """Run Celery's tracer; returns the outcome, and what Celery is to be called with."""
    try:
        with tasks.ready_answer(held.answer()):
            outcome = held.target(*held.args)
    except Exception:  # not of the task, whose errors the tracer keeps: of the message itself
        return "failed", partial(held.on_failure, ExceptionInfo())
    return outcome_of(outcome), partial(held.on_success, outcome)


def _answer_timeout(held: HeldJob) -> None:
    """Let Celery answer, acknowledge and log a job beyond its time limit; give it back if that answer cannot be stored."""
    try:
        held.on_timeout(False, held.timeout_s)
    except ServerUnavailable as error:
        log.error("a result is lost, its job runs again: %s", error, extra={"action": "results_lost"})
        _give_back(held)


def _give_back(held: HeldJob) -> None:
    """Return a job to its queue. First Celery forgets it: a job it counts for ever takes the room of another for ever."""
    task_ready(held.request)
    held.request.reject(requeue=True)


def pool_for(context: WorkerContext, jobs: HeldJobs) -> type[EnginePool]:
    """The pool that Celery is to build for this worker."""
    return type("EnginePool", (EnginePool,), {"context": context, "jobs": jobs, "__module__": __name__})
