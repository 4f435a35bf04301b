"""Sends jobs: checks how they are to be sent, compresses large ones, and sends many in few round trips.

Knows nothing of what a job's arguments mean; its callers check them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

from celery import Task
from celery.result import AsyncResult
from kombu import compression
from kombu.exceptions import BatchPublishError, OperationalError
from kombu.utils.functional import retry_over_time
from kombu.utils.json import dumps
from kombu.utils.uuid import uuid

from embedq.core.errors import InvalidInput, QueueFull
from embedq.tasks.queue_cap import waiting_for_room

#: Jobs with at least so many bytes of texts are compressed. For smaller ones the worker's time is worth more than the
#: server's memory; 64 KiB of prose take zstd 0.2 to 2 ms and shrink to less than a half, of a message that the server
#: holds up to three times.
COMPRESS_FROM_BYTES = 64 * 1024

#: Jobs, and bytes of their texts, in one write to the server: they are in memory, encoded, until it is done.
_MAX_JOBS_PER_WRITE, _MAX_BYTES_PER_WRITE = 1000, 8 * 1024 * 1024

#: The parts of Celery's retry policy for one job that a write of many follows as well.
_POLICY = ("max_retries", "interval_start", "interval_step", "interval_max")

#: A longer id is refused by workers, too; Celery's have 36 characters.
MAX_ID_LENGTH = 200

#: Seconds beyond this are no date any more, and cannot be stored with a result.
_MAX_SECONDS = 2**31


class OutgoingJob(NamedTuple):
    """One checked call of a task, ready to be sent."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_bytes: int
    #: Further options of `apply_async`.
    sending: dict[str, Any]


def checked_sending(sending: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the options by which `apply_async` sends a job; returns them with ids as texts. InvalidInput names a wrong one.

    A worker would refuse such a message, or Celery stop half-way through it: its producer would wait for ever. Options
    that are not listed here are Celery's to check.
    """
    checked = {name: str(value) if isinstance(value, UUID) else value for name, value in sending.items()}
    for name, value in checked.items():
        is_right, wanted = _SENDING.get(name, (_is_anything, ""))
        if value is not None and not is_right(value):
            raise InvalidInput(f"{name} must be {wanted}; given {value!r:.80}")
    return checked


def _is_anything(_: Any) -> bool:
    return True


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_ID_LENGTH


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any, largest: int) -> bool:
    return type(value) is int and 0 <= value <= largest


def _are_seconds(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= _MAX_SECONDS


def _is_number_of_seconds(value: Any) -> bool:
    """A time from now, which may have passed."""
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= _MAX_SECONDS


def _are_headers(value: Any) -> bool:
    """Headers travel as JSON around the job, whatever serializer the job has."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    try:
        dumps(dict(value))
    except (TypeError, ValueError, RecursionError):
        return False
    return True


_ID = (_is_id, f"a text of at most {MAX_ID_LENGTH} characters, or a UUID")
_LIMIT = (_are_seconds, f"seconds from 0 to {_MAX_SECONDS:,}")

#: Options of sending a job: the check of each, and the values it takes in words.
_SENDING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task_id": _ID,
    "root_id": _ID,
    "parent_id": _ID,
    "group_id": _ID,
    "reply_to": (_is_text, "a text"),
    "shadow": (_is_text, "a text"),
    "priority": (lambda value: _is_whole(value, 9), "a whole number from 0, first, to 9"),
    "retries": (lambda value: _is_whole(value, _MAX_SECONDS), "a whole number from 0"),
    "time_limit": _LIMIT,
    "soft_time_limit": _LIMIT,
    "countdown": (_is_number_of_seconds, "a number of seconds"),
    "eta": (lambda value: isinstance(value, datetime), "a datetime"),
    "expires": (
        lambda value: isinstance(value, datetime | str) or _is_number_of_seconds(value),
        "a number of seconds, or a datetime",
    ),
    "headers": (_are_headers, "a map of texts to values that JSON can carry"),
    "block_s": (_are_seconds, f"seconds from 0 to {_MAX_SECONDS:,}"),
    "ignore_result": (lambda value: isinstance(value, bool), "True or False"),
}


def compression_for(num_bytes: int) -> str | None:
    """The compression of a job with so many bytes of texts: zstd if it is large and this process has zstd; else None."""
    is_large = num_bytes >= COMPRESS_FROM_BYTES
    return "zstd" if is_large and "application/zstd" in compression.encoders() else None


def send_many(
    task: Task, calls: Sequence[OutgoingJob], ids: Sequence[str] | None = None, block_s: float | None = None
) -> list[AsyncResult]:
    """Send many jobs of one task, under new ids or those given; returns their results in order.

    A failed write is repeated with the same ids. Some of its jobs may then be in the queue twice: they
    are computed twice, and have one result. BatchPublishError or OperationalError if it keeps failing. QueueFull, with
    the results of the jobs that were sent, if the queue has no room for a write within `block_s` seconds.
    """
    left = iter(ids or [uuid() for _ in calls])
    if task.app.conf.task_always_eager:  # nothing is sent
        return [_send_one(task, call, job_id) for call, job_id in zip(calls, left, strict=True)]
    asked = task.app.conf.task_publish_retry_policy
    policy = {name: asked[name] for name in _POLICY if name in asked}
    jobs: list[AsyncResult] = []
    errors = (BatchPublishError, OperationalError)
    with task.app.producer_or_acquire() as producer:
        for write in _writes(calls, *(task.app.cap or ())):
            given = (task, producer, write, [next(left) for _ in write])
            try:
                jobs += waiting_for_room(partial(retry_over_time, _send, errors, given, **policy), block_s)
            except QueueFull as error:
                error.jobs = jobs
                raise
    return jobs


def _send(task: Task, producer: Any, calls: Sequence[OutgoingJob], ids: Sequence[str]) -> list[AsyncResult]:
    try:
        with producer.batch(max_size=2 * len(calls)):  # written at the end, in one pipeline
            return [_send_one(task, call, job_id, producer) for call, job_id in zip(calls, ids, strict=True)]
    except BatchPublishError as error:
        if isinstance(error.__cause__, QueueFull):
            raise error.__cause__ from None
        raise


def _send_one(task: Task, call: OutgoingJob, job_id: str, producer: Any = None) -> AsyncResult:
    return Task.apply_async(task, call.args, call.kwargs, task_id=job_id, producer=producer, **call.sending)


def _writes(calls: Sequence[OutgoingJob], max_jobs: int = 0, max_bytes: int = 0) -> Iterator[Sequence[OutgoingJob]]:
    """Cut `calls` into parts within the limits of one write; a call above them has a write of its own.

    `max_jobs` and `max_bytes` are those of a queue, 0 for none: a larger write would find room in an empty one alone.
    """
    most_jobs = min(_MAX_JOBS_PER_WRITE, max_jobs or _MAX_JOBS_PER_WRITE)
    most_bytes = min(_MAX_BYTES_PER_WRITE, max_bytes // 2 or _MAX_BYTES_PER_WRITE)  # of texts: messages are larger
    begin, num_bytes = 0, 0
    for end, call in enumerate(calls):
        num_bytes += call.num_bytes
        if end > begin and (end - begin == most_jobs or num_bytes > most_bytes):
            yield calls[begin:end]
            begin, num_bytes = end, call.num_bytes
    if begin < len(calls):
        yield calls[begin:]
