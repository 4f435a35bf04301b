"""Messages that no worker can do anything with, and jobs that killed every worker that took them.

In goes a fetched job; out goes a dead letter with its reason, kept on the server (`transport.lua`
says how, `embedq dead` shows them), and for a poisoned job also a failure for its producer.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from celery.app.task import Context
from celery.worker.request import Request
from kombu.exceptions import DecodeError
from kombu.serialization import prepare_accept_content
from kombu.transport import virtual
from kombu.utils.json import loads

from embedq.core.codec import unpack
from embedq.core.errors import Poisoned
from embedq.workers.broker.fetch import Fetched

log = logging.getLogger(__name__)

#: Content type of what our producers send (`celeryconfig.py`).
_OURS = "application/x-embedq-msgpack"


class Message(virtual.Message):
    """A message that is buried where Celery would acknowledge it as undecodable, and so lose it."""

    _is_undecodable = False

    def _decode(self) -> Any:
        try:
            if self.body and self.content_type == _OURS and _OURS in (self.accept or ()):
                return _unpacked(self.body)
            return super()._decode()
        except Exception:
            self._is_undecodable = True
            raise

    def ack(self, *args: Any, **kwargs: Any) -> None:
        """Acknowledge, or reject what could not be decoded or decompressed."""
        if self._is_undecodable or self.errors:
            self.reject()
        else:
            super().ack(*args, **kwargs)


def _unpacked(body: bytes) -> Any:
    """As kombu decodes, without its way to the decoder, which takes as long as that does."""
    try:
        return unpack(body)
    except Exception as error:
        raise DecodeError(error) from error


def bury_undeliverable(channel: Any, job: Fetched, error: Exception) -> None:
    """Bury a message that the worker stumbled over. The error's words may quote it and are not kept."""
    name = type(error).__name__
    log.error(
        "a message cannot be delivered",
        extra={"action": "message_buried", "queue": job.queue, "tag": job.tag, "error": name},
    )
    detail = "".join(traceback.format_tb(error.__traceback__))
    channel.leases.bury(job.tag, f"cannot be delivered: {name}", detail)
    channel.qos.drop(job.tag)


def bury_poisoned(channel: Any, job: Fetched) -> None:
    """Bury a job whose workers died, after its producer has been told."""
    error = poisoned(job.deliveries, channel.max_attempts)
    log.error("a job is poisoned", extra={"action": "job_poisoned", "queue": job.queue, "tag": job.tag})
    # First the failure: a worker that dies in between finds the job again and stores it again.
    type(channel).fail(channel.Message(loads(job.raw.decode()), channel=channel), error)
    channel.leases.bury(job.tag, "poisoned", str(error))
    channel.qos.drop(job.tag)


def poisoned(deliveries: list[str], max_attempts: int) -> Poisoned:
    """The error of a job with these deliveries: how often a worker died with it, when and where."""
    deaths = []
    for line in deliveries:
        taken_us, _, _, worker, _ = line.split("\t", 4)
        taken = datetime.fromtimestamp(int(taken_us) / 1e6, UTC)
        deaths.append(f"{worker} (taken {taken:%Y-%m-%d %H:%M:%S} UTC)")
    return Poisoned(
        f"{len(deaths)} workers died while they held the job, at most {max_attempts} may: {', '.join(deaths)}. "
        "It is not tried again; `embedq dead` lists it."
    )


def failure_writer(app: Any) -> Callable[[Any, Poisoned], None]:
    """What stores the failure of a poisoned job, given its message, and fails its chord or chain with it."""

    def store(message: Any, error: Poisoned) -> None:
        context = _context(app, message)
        if context.id:
            app.backend.mark_as_failure(context.id, error, request=context)

    return store


def _context(app: Any, message: Any) -> Context:
    """What Celery knows of the job; only its id where the rest cannot be read."""
    message.accept = prepare_accept_content(app.conf.accept_content)  # as a consumer does
    try:
        context: Context = Request(message, app=app)._context
    except Exception:  # a body that cannot be decoded, a task that is not ours
        headers = message.headers or {}
        context = Context(id=headers.get("id"), errbacks=None, chord=None, chain=None)
    return context
