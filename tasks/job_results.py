"""The results of our jobs: they may be waited for inside a task of an application, whose workers are not ours.

Celery refuses to wait inside any task, because a pool whose tasks all wait for tasks of the same pool stops for ever. Jobs
of ours run on workers of ours. What can stop for ever is refused: a task that itself runs on one of our queues
(`WouldBlock`), and a result that depends on a task of the application, which is left to Celery.
"""

from __future__ import annotations

from typing import Any

from celery import Celery, current_task
from celery.result import EagerResult, GroupResult, ResultSet

from embedq.core.errors import WouldBlock
from embedq.tasks.celery_private import CheckedResult
from embedq.tasks.stock_workers import is_ours, may_share_queues


class _Waiting:
    """Answers for Celery's check of whoever waits: whether it is needed."""

    def get(self, *args: Any, disable_sync_subtasks: bool = True, **options: Any) -> Any:
        """Wait as Celery does, also inside a task of an application. WouldBlock inside one on a queue of ours."""
        return super().get(*args, disable_sync_subtasks=is_refused(self, disable_sync_subtasks), **options)  # type: ignore[misc]

    wait = get


class JobResult(_Waiting, CheckedResult):
    """A job's result."""


class ReadyResult(_Waiting, EagerResult):
    """The result of a job that was computed where it was sent (`task_always_eager`)."""


class _WaitingForAll(_Waiting):
    def join(self, *args: Any, disable_sync_subtasks: bool = True, **options: Any) -> Any:
        """As `get`."""
        return super().join(*args, disable_sync_subtasks=is_refused(self, disable_sync_subtasks), **options)  # type: ignore[misc]

    def join_native(self, *args: Any, disable_sync_subtasks: bool = True, **options: Any) -> Any:
        """As `get`."""
        return super().join_native(*args, disable_sync_subtasks=is_refused(self, disable_sync_subtasks), **options)  # type: ignore[misc]


class JobResultSet(_WaitingForAll, ResultSet):
    """The results of several jobs."""


class JobGroupResult(_WaitingForAll, GroupResult):
    """The results of a group of jobs."""


def is_refused(result: Any, is_asked: bool) -> bool:
    """What to tell Celery about a wait: True has it refuse one inside a task. WouldBlock where we refuse it ourselves."""
    if not is_asked:
        return False
    if not _is_of_jobs(result):
        return True
    if not isinstance(result, ReadyResult):
        refuse_on_our_queue(result.app)
    return False


def refuse_on_our_queue(app: Celery) -> None:
    """WouldBlock if this thread runs a task that came from a queue of `app`, ours: its worker must not wait for itself."""
    if not current_task:
        return
    queue = (current_task.request.delivery_info or {}).get("routing_key")
    if isinstance(queue, str) and is_ours(queue) and may_share_queues(current_task.app, app):
        raise WouldBlock(
            f"the task {current_task.name!r:.80} came from embedq's queue {queue!r:.80} and may not wait for a job of embedq: a "
            "worker that holds nothing but tasks that wait would take no job they wait for. Let a worker of its own run it, or "
            "chain it behind the job"
        )


def _is_of_jobs(result: Any) -> bool:
    """Returns True if a result needs jobs of ours and nothing else: also all that go before it in its chain or chord."""
    while result is not None:
        if isinstance(result, ResultSet):
            if not all(map(_is_of_jobs, result.results)):
                return False
        elif not isinstance(result, JobResult | ReadyResult):
            return False
        result = getattr(result, "parent", None)
    return True
