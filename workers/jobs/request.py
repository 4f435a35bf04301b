"""A job on the worker's event loop: Celery's own request, with seven changes.

It checks the types of its message, never shows its arguments, does not decode its message a second time, leaves the
engine's backlog when it is revoked before any of it was computed, is acknowledged together with others, always
returns its part of a chord, and has what follows a message in JSON sent in JSON.
"""

from __future__ import annotations

import logging
import re
from functools import partial
from typing import Any
from uuid import UUID

from celery.app.task import Context

from embedq.workers.broker.in_flight import QoS
from embedq.workers.celery_private import RequestBase
from embedq.workers.jobs.json_senders import follow_in_json
from embedq.workers.jobs.message_schema import check_shape

log = logging.getLogger(__name__)

#: The summaries that our producers write; anything else is a repr of the texts and is not shown.
_SUMMARY = re.compile(r"([\d,]+) (?:texts?|passages?), ([\d,]+) characters|rows [\d,]+–[\d,]+ of [\w.,=@+?/ -]{1,80}")


#: Stands for arguments that may be texts.
_NOT_SHOWN = "(not shown)"

#: Headers that Celery knows. Any others become the `headers` of the task's request.
_HEADERS = frozenset(vars(Context)) | {"lang", "task", "argsrepr", "kwargsrepr", "compression"}

#: A message without its body: headers and properties of a job with a summary.
_ENVELOPE_BYTES = 1024


class OtherRequest(RequestBase):
    """`Task.Request` of all other tasks that come to our queues: their arguments may be texts, too, and are not shown."""

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)
        self.show_arguments_as(_NOT_SHOWN, _NOT_SHOWN)

    def info(self, safe: bool = False) -> dict[str, Any]:
        """The fields that inspection shows: no argument is among them."""
        shown: dict[str, Any] = super().info(safe=True)
        return shown


class EngineRequest(RequestBase):
    """`Task.Request` of the tasks that the engine runs."""

    #: Whether it was acknowledged or given back, or soon will be.
    acknowledged: bool = False

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("decoded", True):
            # Celery's strategy has decoded the body already, to look up the protocol.
            kwargs |= {"body": message.payload, "decoded": True}
        kwargs["headers"] = _with_ids_as_texts(kwargs.get("headers") or message.headers)
        message.properties = _with_ids_as_texts(message.properties or {})
        check_shape(kwargs["headers"], kwargs["body"], message.properties)
        follow_in_json(message, kwargs["body"][2])
        super().__init__(message, *args, **kwargs)
        #: About what the message takes in its list: base64 of the body, and the envelope.
        self.num_bytes = len(message.body or b"") * 4 // 3 + _ENVELOPE_BYTES
        if _is_chord_part(kwargs.get("body")):
            # Celery skips a redelivered job that has a result. But its worker may have died between storing the
            # result and returning the part, and nobody else returns it: run it again, both are idempotent.
            self.fields["delivery_info"] = self.fields["delivery_info"] | {"redelivered": False}
        if self.fields.keys() <= _HEADERS:
            self.fields.setdefault("headers", {})  # there are none: Celery would look for them again
        #: How many texts and characters its sender says it holds; None if it does not say.
        self.amount: tuple[int, int] | None = None
        if not (summary := _SUMMARY.fullmatch(self.argsrepr or "")):
            self.show_arguments_as(*_summary(kwargs.get("task"), kwargs["body"]))
        elif summary[1]:
            self.amount = _number(summary[1]), _number(summary[2])

    def acknowledge(self) -> None:
        """Acknowledge the job together with others that are done."""
        if self.acknowledged:
            return
        if QoS.acknowledge_soon(partial(self.message.ack_log_error, log, self.connection_errors)):
            self.acknowledged = True
        else:
            super().acknowledge()

    def info(self, safe: bool = False) -> dict[str, Any]:
        """The fields that inspection shows: the summary, also where Celery would show the texts."""
        shown: dict[str, Any] = super().info(safe=True)
        return shown

    @property
    def priority(self) -> int:
        """0 interactive to 9 bulk."""
        return int((self.delivery_info or {}).get("priority") or 0)

    @property
    def expires_s(self) -> float | None:
        """The moment from which it is no longer wanted, as `time.time()` counts; None for never."""
        return self.expires.timestamp() if self.expires else None

    @property
    def is_reported(self) -> bool:
        """True if its sender knows that a job may say that it has started: Celery's name their origin, and know all states.

        A program that speaks the wire itself may take whatever stands at the key for the answer.
        """
        return bool(self.fields.get("origin"))

    @property
    def is_leased(self) -> bool:
        """False once another worker holds it, because this one did not get on: then that one says how it goes."""
        channel = self.message.channel
        return channel is None or self.message.delivery_tag in channel.qos.taken

    def when_revoked(self, reason: str) -> None:
        """Log it: whoever looks for a job's end must find it."""
        log.info("a job is not wanted any more", extra={"action": "job_revoked", "job": self.id, "reason": reason})

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Stop it: a waiting job leaves the backlog, a running one's rows are dropped."""
        if self.time_start:
            super().terminate(pool, signal)
        else:
            pool.drop_revoked()


def _summary(task: Any, body: Any) -> tuple[str, str]:
    """The summaries of arguments and options that our producer would have written, of a job that was sent by name."""
    try:
        sending = task.checked(body[0], body[1]).sending
        return sending["argsrepr"], sending["kwargsrepr"]
    except Exception:  # wrong in any way, which the job's failure will say, and its arguments may be anything
        return _NOT_SHOWN, _NOT_SHOWN


def _with_ids_as_texts(fields: dict[str, Any]) -> dict[str, Any]:
    """A producer that has no check may send a UUID as an id; Celery stores the result where its text says."""
    if not any(isinstance(value, UUID) for value in fields.values()):
        return fields
    return {name: str(value) if isinstance(value, UUID) else value for name, value in fields.items()}


def _number(digits: str) -> int:
    return int(digits.replace(",", "")[:15] or 0)


def _is_chord_part(body: Any) -> bool:
    """Returns True if a body, which holds arguments, keywords and what follows the job, names a chord that it is part of."""
    return isinstance(body, list | tuple) and len(body) == 3 and bool(body[2] and body[2].get("chord"))
