"""Stores that a job runs, where, since when and how far it is, once it has run for a second: `job.state`, `job.info`.

A job that is answered sooner costs nothing here. Of the others a few dozen a second are stored, in one call of a script
that writes only where there is no answer: a late report never replaces a result. The script also says which of them are
cancelled, in case the worker was not told. Runs on the answers thread, so that no report follows the result of its job.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
from celery import states

from embedq.workers.jobs.answer_thread import AnswersThread
from embedq.workers.jobs.held_job import HeldJob, HeldJobs

log = logging.getLogger(__name__)

#: Seconds that a job runs before it is reported, and seconds between two looks at the jobs that run.
AFTER_S, EVERY_S = 1.0, 1.0

#: Jobs of one look: those that were never reported first, then those whose last report is the oldest.
_MAX_JOBS = 100

#: KEYS: keys of results. ARGV: seconds to live (0 for ever), then a report for each. Returns for each 1 if its job is
#: cancelled, else 0. Celery packs the state first; of a large result nothing else is read.
_REPORT = """
local may_follow = { STARTED = true, RETRY = true, PENDING = true, RECEIVED = true }
local reply = {}
for number, key in ipairs(KEYS) do
    local head = redis.pcall('GETRANGE', key, 0, 25)
    head = type(head) == 'string' and head or '?'
    local state = head:match('^[\\128-\\143]\\166status[\\160-\\191](%u+)')
    if head == '' or (state and may_follow[state]) then
        if ARGV[1] == '0' then
            redis.call('SET', key, ARGV[1 + number])
        else
            redis.call('SET', key, ARGV[1 + number], 'EX', ARGV[1])
        end
        redis.call('PUBLISH', key, ARGV[1 + number])
    end
    reply[number] = head:sub(2) == '\\166status\\167REVOKED\\169cancelled' and 1 or 0
end
return reply
"""

#: KEYS: keys of results. Those that still say that their job runs are emptied, and gone after a millisecond: it waits
#: again. A worker may delete no result.
_TAKE_BACK = """
for _, key in ipairs(KEYS) do
    local head = redis.pcall('GETRANGE', key, 0, 25)
    if type(head) == 'string' and head:sub(2, 16) == '\\166status\\167STARTED' then
        redis.call('SET', key, '', 'PX', 1)
    end
end
"""


class ProgressReports:
    """Reports the jobs of one worker that run for long. All but `take_back` runs on the answers thread."""

    def __init__(
        self,
        jobs: HeldJobs,
        answers: AnswersThread,
        backend: Callable[[], Any],
        worker: str,
        cancel: Callable[[list[str]], None],
    ) -> None:
        """`backend` is the worker's result backend on the calling thread; `cancel` ends jobs, given their ids."""
        self._jobs = jobs
        self._answers = answers
        self._backend = backend
        self._worker = worker
        self._cancel = cancel
        self._is_looking = False
        #: From this process's clock to Unix time; looked up once, so that a job's start is the same in every report.
        self._epoch_s = time.time() - time.monotonic()

    def watch(self) -> None:
        """A job has started: look at the jobs that run once it has run for long, and then now and again."""
        if not self._is_looking:
            self._is_looking = True
            self._answers.run_later(AFTER_S, self._look)

    def _look(self) -> None:
        now_s = time.monotonic()
        running = [held for held in self._jobs.all() if held.is_running]
        due = [held for held in running if now_s - held.started_s >= AFTER_S and held.is_news]
        due.sort(key=lambda held: held.reported_s)
        try:
            if due:
                self._report(due[:_MAX_JOBS], now_s)
        except (redis.RedisError, OSError) as error:  # results wait for the server; reports do not
            fields = {"action": "progress_unreported", "error": type(error).__name__}
            log.debug("the progress of jobs cannot be stored", extra=fields)
        finally:
            self._is_looking = bool(running)
            if running:
                self._answers.run_later(EVERY_S, self._look)

    def _report(self, due: Sequence[HeldJob], now_s: float) -> None:
        backend = self._backend()
        keys = [backend.get_key_for_task(held.request.id) for held in due]
        for held in due:
            held.reported_s, held.reported = now_s, held.progress
        reports = [backend.encode(self._meta(held)) for held in due]
        report = backend.client.register_script(_REPORT)
        told = report(keys=keys, args=[int(backend.expires or 0), *reports])
        if cancelled := [held.request.id for held, is_cancelled in zip(due, told, strict=True) if is_cancelled]:
            self._cancel(cancelled)

    def _meta(self, held: HeldJob) -> dict[str, Any]:
        """Celery's map of a job that has started, with more of how it goes."""
        done, total = held.progress
        info = {
            "hostname": self._worker,
            "pid": os.getpid(),
            "started": round(self._epoch_s + held.started_s, 3),
            "done": done,
            "total": total,
        }
        return {
            "status": states.STARTED,
            "result": info,
            "traceback": None,
            "children": [],
            "date_done": None,
            "task_id": held.request.id,
        }

    def take_back(self, jobs: Sequence[HeldJob]) -> None:
        """These jobs do not run here any more, and have no answer: what was reported of them is removed. Any thread may call it."""
        reported = [held.request.id for held in jobs if held.reported_s]
        if not reported:
            return
        backend = self._backend()
        try:
            backend.client.register_script(_TAKE_BACK)(keys=[backend.get_key_for_task(job_id) for job_id in reported])
        except (redis.RedisError, OSError) as error:
            fields = {"action": "progress_unreported", "error": type(error).__name__}
            log.debug("jobs that were given back still seem to run", extra=fields)
