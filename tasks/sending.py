"""Sends jobs: compresses large ones, and sends many in few round trips.

Knows nothing of what a job's arguments mean; its callers check them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from celery import Task
from celery.result import AsyncResult
from kombu import compression
from kombu.exceptions import BatchPublishError, OperationalError
from kombu.utils.functional import retry_over_time
from kombu.utils.uuid import uuid

#: Jobs with at least so many bytes of texts are compressed. For smaller ones the worker's time is worth more than the
#: server's memory; 64 KiB of prose take zstd 0.2 to 2 ms and shrink to less than a half, of a message that the server
#: holds up to three times.
COMPRESS_FROM_BYTES = 64 * 1024

#: Jobs, and bytes of their texts, in one write to the server: they are in memory, encoded, until it is done.
_MAX_JOBS_PER_WRITE, _MAX_BYTES_PER_WRITE = 1000, 8 * 1024 * 1024

#: The parts of Celery's retry policy for one job that a write of many follows as well.
_POLICY = ("max_retries", "interval_start", "interval_step", "interval_max")


class OutgoingJob(NamedTuple):
    """One checked call of a task, ready to be sent."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_bytes: int
    #: Further options of `apply_async`.
    sending: dict[str, Any]


def compression_for(num_bytes: int) -> str | None:
    """The compression of a job with so many bytes of texts: zstd if it is large and this process has zstd; else None."""
    is_large = num_bytes >= COMPRESS_FROM_BYTES
    return "zstd" if is_large and "application/zstd" in compression.encoders() else None


def send_many(task: Task, calls: Sequence[OutgoingJob]) -> list[AsyncResult]:
    """Send many jobs of one task; returns their results in order.

    A failed write is repeated with the same ids. Some of its jobs may then be in the queue twice: they
    are computed twice, and have one result. BatchPublishError or OperationalError if it keeps failing.
    """
    asked = task.app.conf.task_publish_retry_policy
    policy = {name: asked[name] for name in _POLICY if name in asked}
    jobs: list[AsyncResult] = []
    with task.app.producer_or_acquire() as producer:
        for write in _writes(calls):
            given = (task, producer, write, [uuid() for _ in write])
            jobs += retry_over_time(_send, (BatchPublishError, OperationalError), given, **policy)
    return jobs


def _send(task: Task, producer: Any, calls: Sequence[OutgoingJob], ids: Sequence[str]) -> list[AsyncResult]:
    with producer.batch(max_size=2 * len(calls)):  # written at the end, in one pipeline
        return [
            Task.apply_async(task, call.args, call.kwargs, task_id=job_id, producer=producer, **call.sending)
            for call, job_id in zip(calls, ids, strict=True)
        ]


def _writes(calls: Sequence[OutgoingJob]) -> Iterator[Sequence[OutgoingJob]]:
    """Cut `calls` into parts within the limits of one write; a call above them has a write of its own."""
    begin, num_bytes = 0, 0
    for end, call in enumerate(calls):
        num_bytes += call.num_bytes
        if end > begin and (end - begin == _MAX_JOBS_PER_WRITE or num_bytes > _MAX_BYTES_PER_WRITE):
            yield calls[begin:end]
            begin, num_bytes = end, call.num_bytes
    if begin < len(calls):
        yield calls[begin:]
