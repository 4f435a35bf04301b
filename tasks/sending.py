"""Sending: which jobs travel compressed, and many jobs in few round trips.

Knows nothing of what a job's arguments mean; they are checked before they come here.
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

#: Bytes of texts from which on a job is compressed. Below, the worker's time for it is worth more
#: than the server's memory; at 64 KiB of prose zstd takes 0.2 to 2 ms and leaves less than a half,
#: of a message that the server holds up to three times.
COMPRESS_FROM_BYTES = 64 * 1024

#: Jobs, and bytes of their texts, that go to the server in one write: what is not yet written is
#: held in memory, encoded.
_MAX_JOBS_PER_WRITE, _MAX_BYTES_PER_WRITE = 1000, 8 * 1024 * 1024

#: What Celery's policy for sending one job says of how often and when to try again, and a write keeps to as well.
_POLICY = ("max_retries", "interval_start", "interval_step", "interval_max")


class OutgoingJob(NamedTuple):
    """One checked call of a task."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_bytes: int
    #: What `apply_async` takes besides.
    sending: dict[str, Any]


def compression_for(num_bytes: int) -> str | None:
    """How a job of that many bytes of texts travels: zstd where it is large and this process has it."""
    is_large = num_bytes >= COMPRESS_FROM_BYTES
    return "zstd" if is_large and "application/zstd" in compression.encoders() else None


def send_many(task: Task, calls: Sequence[OutgoingJob]) -> list[AsyncResult]:
    """Send many jobs of one task; returns their results in order.

    A write that fails is repeated as it was, ids included. Some of its jobs may then be in the queue
    twice: they are computed twice, and have one result. BatchPublishError or OperationalError
    if it keeps failing.
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
    """Cut `calls` into parts within the limits of one write; a call above them goes alone."""
    begin, num_bytes = 0, 0
    for end, call in enumerate(calls):
        num_bytes += call.num_bytes
        if end > begin and (end - begin == _MAX_JOBS_PER_WRITE or num_bytes > _MAX_BYTES_PER_WRITE):
            yield calls[begin:end]
            begin, num_bytes = end, call.num_bytes
    if begin < len(calls):
        yield calls[begin:]
