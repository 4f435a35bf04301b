"""Rejects messages that cannot become jobs: stores a failure for the producer, and the worker goes on.

Input: a message, and the error with which kombu or Celery could not read it. Output: a failure at the job's key, then
the acknowledgement; or a dead letter, where the message names no job. Celery by itself logs the message, texts
included, and stores nothing, so that the producer waits for ever.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from celery import bootsteps
from celery.app.task import Context

from embedq.core.errors import InvalidInput, ProducerError, ServerUnavailable
from embedq.workers.celery_private import Consumer
from embedq.workers.jobs.message_schema import Misshapen

log = logging.getLogger(__name__)

#: A longer id is none; Celery's have 36 characters.
_MAX_ID_LENGTH = 200


class Refusal(bootsteps.Step):
    """Consumer step: calls `refuse` where Celery would log a message and drop it."""

    def __init__(self, consumer: Consumer, **options: Any) -> None:
        super().__init__(consumer, **options)
        consumer.on_decode_error = partial(refuse, consumer)
        consumer.on_invalid_task = lambda body, message, error: refuse(consumer, message, error)


def refuse(consumer: Consumer, message: Any, error: Exception) -> None:
    """Store why a message is refused, then acknowledge it; if that cannot be stored, give it back, to be refused later."""
    job_id = _job_id(message)
    reason = error if isinstance(error, ProducerError) else _reason(message, error)
    log.warning(
        "a message cannot become a job and is refused",
        extra={"action": "message_refused", "job": job_id, "reason": str(reason)},
    )
    if job_id:
        try:
            consumer.app.backend.mark_as_failure(job_id, reason, request=_context(job_id, message.headers))
        except ServerUnavailable:
            log.exception(
                "the failure of a refused message cannot be stored", extra={"action": "refusal_waits", "job": job_id}
            )
            # Held on, it would be renewed and refused by nobody until the next reconnect.
            message.reject_log_error(log, consumer.connection_errors, requeue=True)
            return
    # Without a job id no producer can learn of it: the message is kept as a dead letter.
    settle = message.ack_log_error if job_id else message.reject_log_error
    settle(log, consumer.connection_errors)


def _reason(message: Any, error: Exception) -> InvalidInput:
    if isinstance(error, Misshapen):
        return InvalidInput(str(error))
    headers = message.headers if isinstance(message.headers, dict) else {}
    if headers.get("compression"):
        return InvalidInput("workers read messages compressed with zstd or gzip; this one is compressed otherwise")
    return InvalidInput(f"the message cannot be read as a job ({type(error).__name__})")


def _context(job_id: str, headers: dict[str, Any]) -> Context:
    """What is known of the job: how its sender wants the answer. What follows it cannot be trusted, and is not sent."""
    return Context(id=job_id, headers=headers, errbacks=None, chord=None, chain=None)


def _job_id(message: Any) -> str | None:
    job_id = message.headers.get("id") if isinstance(message.headers, dict) else None
    return job_id if isinstance(job_id, str) and 0 < len(job_id) <= _MAX_ID_LENGTH else None
