"""Buries messages that no worker can read, and jobs that killed every worker that held them.

Input: a fetched job. Output: a dead letter with its reason, kept on the server (`transport.lua` writes it,
`embedq dead` shows it), and for a poisoned job also a failure for its producer.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from celery import Celery
from celery.app.task import Context
from kombu.exceptions import DecodeError
from kombu.serialization import prepare_accept_content
from kombu.utils.json import loads

from embedq.core.codec import unpack
from embedq.core.errors import Poisoned
from embedq.workers.broker.fetch import Fetched
from embedq.workers.broker.leases import HoldingChannel
from embedq.workers.celery_private import MessageBase, context_of

log = logging.getLogger(__name__)

#: Content type of what our producers send (`celeryconfig.py`).
_OURS = "application/x-embedq-msgpack"


class ReadingChannel(HoldingChannel, Protocol):
    """A channel that holds jobs and whose messages can be read."""

    #: The class of its messages.
    Message: Any
    max_attempts: int


class Message(MessageBase):
    """A message that becomes a dead letter if it cannot be decoded; Celery would acknowledge and lose it."""

    _is_undecodable = False

    def read_body(self, read: Callable[[], Any]) -> Any:
        """Decode the body, and note if it cannot be decoded."""
        try:
            if self.body and self.content_type == _OURS and _OURS in (self.accept or ()):
                return _unpacked(self.body)
            return read()
        except Exception:
            self._is_undecodable = True
            raise

    def ack(self, *args: Any, **kwargs: Any) -> None:
        """Acknowledge the message, or reject it if it could not be decoded or decompressed."""
        if self._is_undecodable or self.errors:
            self.reject()
        else:
            super().ack(*args, **kwargs)


def _unpacked(body: bytes) -> Any:
    """Decode as kombu does, without its lookup of the decoder, which takes as long as decoding."""
    try:
        return unpack(body)
    except Exception as error:
        raise DecodeError(error) from error


def bury_undeliverable(channel: HoldingChannel, job: Fetched, error: Exception) -> None:
    """Bury a message whose delivery raised. The error's text may quote the message and is not kept."""
    name = type(error).__name__
    log.error(
        "a message cannot be delivered and becomes a dead letter",
        extra={"action": "message_buried", "queue": job.queue, "tag": job.tag, "error": name},
    )
    detail = "".join(traceback.format_tb(error.__traceback__))
    channel.leases.bury(job.tag, f"cannot be delivered: {name}", detail)
    channel.qos.drop(job.tag)


def bury_poisoned(channel: ReadingChannel, job: Fetched) -> None:
    """Bury a job whose workers died, after the failure for its producer is stored. ServerUnavailable if it cannot be."""
    error = poisoned(job.deliveries, channel.max_attempts)
    message = channel.Message(loads(job.raw.decode()), channel=channel)
    log.error(
        "a job killed every worker that held it and becomes a dead letter",
        extra={"action": "job_poisoned", "job": _id_of(message), "queue": job.queue, "tag": job.tag},
    )
    # First the failure: a worker that dies in between finds the job again and stores it again.
    channel.context.fail(message, error)
    channel.leases.bury(job.tag, "poisoned", str(error))
    channel.qos.drop(job.tag)


def _id_of(message: Message) -> Any:
    """The id of a message's job; None if it has none, or anything else in its headers' place."""
    return message.headers.get("id") if isinstance(message.headers, dict) else None


def poisoned(deliveries: list[str], max_attempts: int) -> Poisoned:
    """The error of a job with these deliveries: how many workers died with it, when and where."""
    deaths = []
    for line in deliveries:
        taken_us, _, _, worker, _ = line.split("\t", 4)
        taken = datetime.fromtimestamp(int(taken_us) / 1e6, UTC)
        deaths.append(f"{worker} (taken {taken:%Y-%m-%d %H:%M:%S} UTC)")
    return Poisoned(
        f"{len(deaths)} workers died while they held the job, at most {max_attempts} may: {', '.join(deaths)}. "
        "It is not tried again; `embedq dead` lists it."
    )


def failure_writer(app: Celery) -> Callable[[Any, Poisoned], None]:
    """A function that stores the failure of a poisoned job, and fails its chord or chain with it."""

    def store(message: Any, error: Poisoned) -> None:
        context = _context(app, message)
        if context.id:
            app.backend.mark_as_failure(context.id, error, request=context)

    return store


def _context(app: Celery, message: Any) -> Context:
    """Celery's context of the job; only its id if the rest cannot be read."""
    message.accept = prepare_accept_content(app.conf.accept_content)  # as a consumer does
    try:
        context = context_of(message, app)
    except Exception:  # a body that cannot be decoded, a task that is not ours
        headers = message.headers or {}
        context = Context(id=headers.get("id"), headers=headers, errbacks=None, chord=None, chain=None)
    return context
