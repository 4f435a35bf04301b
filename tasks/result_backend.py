"""Result backend of a producer: Celery's own on Redis, but it subscribes only when somebody waits.

    job = tasks.embed.delay(texts)     one LPUSH; nothing is subscribed
    job.get()                          GET; and if it is not there: SUBSCRIBE, GET again, wait
    job.forget()                       DEL, and UNSUBSCRIBE if somebody had waited

Keys, blobs and channels are Celery's, so that stock producers and stock workers read and write the
same. A value that is read need not be what a worker wrote: it is checked here, and a malformed one fails the wait for
that result and no other. Knows nothing of queues, models or batches.
"""

from __future__ import annotations

import os
import ssl
import sys
import time
import weakref
from collections.abc import Iterator
from typing import Any

import redis
from celery import states
from celery.backends.base import COMPRESSED_PAYLOAD_MAGIC
from celery.backends.redis import SentinelBackend
from celery.result import AsyncResult, ResultSet, result_from_tuple

from embedq.core import errors
from embedq.core.codec import unpack_json
from embedq.tasks.celery_private import ConsumerBase, ReadingBackend, known_meta

#: Keys of one MGET: all their values are in memory at once.
MAX_KEYS_PER_MGET = 100

#: Seconds the server has to confirm a subscription if no socket timeout is set.
_CONFIRM_TIMEOUT_S = 15.0

#: The module of our errors' classes, and its name in workers before 0.2.0.
_ERRORS, _FORMER_ERRORS = errors.__name__, "core.errors"

#: A longer name of an error's class is refused.
_MAX_NAME_LENGTH = 200

#: Errors of a server that refuses us: a wrong password, a user without rights.
_REFUSALS = (redis.AuthenticationError, redis.exceptions.AuthorizationError, redis.exceptions.NoPermissionError)


def is_refusal(error: BaseException) -> bool:
    """True for authentication, permission and certificate errors, which retrying cannot fix."""
    return isinstance(error, _REFUSALS) or isinstance(error.__context__, ssl.SSLCertVerificationError)


class LateConsumer(ConsumerBase):
    """Records which results may be waited for, and subscribes to them when somebody waits.

    Celery subscribes when a job is sent, and for a group when its result object is made: that is a round trip each, and
    the subscriptions stay if nobody ever waits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Keys of pending results that somebody holds, and that are not subscribed to yet.
        self._wanted: set[bytes] = set()
        _consumers.add(self)

    def consume_from(self, task_id: str) -> None:
        """Record that this result is wanted. Sends nothing.

        Whoever holds the subscription may not have ended it yet for this result, which was not wanted a moment ago: it
        would end the new one.
        """
        key = self.key_of(task_id)
        self.unsubscribing.discard(key)
        self._wanted.add(key)

    def cancel_for(self, task_id: str) -> None:
        """Record that the result is not wanted any more, and unsubscribe from it."""
        self._wanted.discard(self.key_of(task_id))
        super().cancel_for(task_id)

    def on_wait_for_pending(self, result: Any, **options: Any) -> None:
        """Read the results that are stored, and subscribe to the others: somebody waits from now on."""
        for job in _jobs(result):
            # A group asks the backend of the thread that waits, its jobs that of the thread that made
            # them: Celery waits for ever where the two differ.
            if job.backend is not self.backend and not known_meta(job):
                self.backend.hold(job)
        super().on_wait_for_pending(result, **options)
        if not result.on_ready.ready:
            with self.locked(), self.reconnect_on_error():
                self._subscribe()

    def drain_events(self, timeout: float | None = None) -> None:
        """Subscribe, then read as Celery does: who drains waits, for results with a `then` callback above all."""
        if self._wanted:
            with self.locked(), self.reconnect_on_error():
                self._subscribe()
        super().drain_events(timeout)

    def on_state_change(self, meta: dict[str, Any], message: Any) -> None:
        """Handle a result as Celery does, but drop it if nobody waits for it: its key is read when somebody does.

        A result that came over a channel is of the channel's job, whatever id it carries.
        """
        if message:
            meta["task_id"] = self.backend.id_of(message["channel"])
        if self.on_message or self.is_waited_for(meta.get("task_id")):
            super().on_state_change(meta, message)
        elif meta["status"] != states.PENDING:  # which is no blob, and names no job
            self.stop_waiting_for(meta)
        if meta["status"] in states.READY_STATES:
            for results in self.held:
                results.pop(meta["task_id"], None)

    def on_after_fork(self) -> None:
        """In a forked process: leave the subscription to the parent, and subscribe anew when somebody waits.

        Called after every fork. Parent and child would read the same socket, and each would miss what the other read.
        Nothing is closed: that takes locks which a thread that was not forked may have held.
        """
        if self.subscription is not None:
            _abandoned.append(self.subscription)
        self.subscription = None
        self.forget_locks()
        self._wanted |= self.subscribed_to
        self.subscribed_to.clear()

    def reconnect(self) -> None:
        """Subscribe anew to all that somebody still waits for."""
        with self.locked():
            if self.subscription is not None:
                self.subscription.close()
            self.subscription = None
            self._wanted |= self.subscribed_to - self.unsubscribing
            self.subscribed_to.clear()
            self.unsubscribing.clear()
            self._subscribe()

    def _subscribe(self) -> None:
        """Subscribe to all wanted results in one command.

        The keys are read after the server has confirmed: a result stored in between is then seen in one of the two
        places, in whatever order the server serves the two connections.
        """
        keys = list(self._wanted)
        if not keys:
            return
        if self.subscription is None:
            self.subscription = self.backend.client.pubsub()
        self.subscription.subscribe(*keys)
        self.subscribed_to.update(keys)
        self._wanted.difference_update(keys)
        self._wait_for_confirmation(set(keys))
        for begin in range(0, len(keys), MAX_KEYS_PER_MGET):
            self._read(keys[begin : begin + MAX_KEYS_PER_MGET])

    def _wait_for_confirmation(self, keys: set[bytes]) -> None:
        patience_s = self.backend.connparams.get("socket_timeout") or _CONFIRM_TIMEOUT_S
        deadline_s = time.monotonic() + patience_s
        while keys:
            message = self.subscription.get_message(timeout=max(deadline_s - time.monotonic(), 0))
            if message is None and time.monotonic() >= deadline_s:
                raise redis.TimeoutError("the server does not confirm a subscription")
            if message and message["type"] == "subscribe":
                keys.discard(message["channel"])
            elif message and message["type"] == "message":
                self.on_state_change(self.decoded(message["data"]), message)

    def _read(self, keys: list[bytes]) -> None:
        waited_for = [key for key in keys if key not in self.unsubscribing]
        for key, blob in zip(waited_for, self.backend.client.mget(waited_for) if waited_for else (), strict=True):
            if blob:
                self.on_state_change(self.decoded(blob), {"channel": key})


#: Every consumer of this process, and subscriptions of the process it was forked from: kept, because the client library
#: closes what is not referenced any more.
_consumers: weakref.WeakSet[LateConsumer] = weakref.WeakSet()
_abandoned: list[Any] = []


def _leave_subscriptions_to_parent() -> None:
    for consumer in list(_consumers):
        consumer.on_after_fork()


os.register_at_fork(after_in_child=_leave_subscriptions_to_parent)


def _jobs(result: Any) -> Iterator[AsyncResult]:
    """The jobs of a result, which may be a group of groups."""
    if isinstance(result, ResultSet):
        for part in result.results:
            yield from _jobs(part)
    else:
        yield result


class ResultBackend(ReadingBackend):
    """Results on one server."""

    ResultConsumer = LateConsumer

    def exception_safe_to_retry(self, exc: BaseException) -> bool:
        """Like Celery's, but a server that refuses us is not retried."""
        return bool(super().exception_safe_to_retry(exc)) and not is_refusal(exc)

    def decode(self, payload: Any) -> Any:
        """Like Celery's, but nothing is decompressed: our workers compress no results, and bytes could become gigabytes.

        A result that its sender asked for in JSON is read as any other.
        """
        if isinstance(payload, bytes) and payload.startswith(b"{"):
            return unpack_json(payload)
        if isinstance(payload, bytes) and payload.startswith(COMPRESSED_PAYLOAD_MAGIC):
            raise ValueError("results are not compressed")
        return super().decode(payload)

    def decode_result(self, payload: Any) -> dict[str, Any]:
        """Celery's result map; a FAILURE if the bytes are no result map."""
        try:
            meta = self.decode(payload)
            _check_meta(meta)
            for child in meta.get("children") or ():
                result_from_tuple(child, self.app)
            return dict(self.meta_from_decoded(meta))
        except Exception as error:  # of whatever kind: the bytes are anybody's
            reason = ValueError(f"the value stored for this job is no result ({type(error).__name__})")
            return {"status": states.FAILURE, "result": reason, "traceback": None, "children": [], "task_id": ""}

    def exception_to_python(self, exc: Any) -> Any:
        """Like Celery's, but a class must be an Exception in a module that is loaded already.

        Celery follows a dotted name with getattr, which makes some modules import others, and raises
        whatever it finds there, SystemExit included.
        """
        if (
            isinstance(exc, dict)
            and exc.get("exc_module") == _FORMER_ERRORS
            and _is_known_error(_ERRORS, exc.get("exc_type"))
        ):
            exc = exc | {"exc_module": _ERRORS}
        if isinstance(exc, dict) and not _is_known_error(exc.get("exc_module"), exc.get("exc_type")):
            exc = exc | {"exc_module": None}  # Celery then makes a class of that name
        return super().exception_to_python(exc)

    def get_many(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Like Celery's, but a result is of the job whose key it was found at."""
        for job_id, meta in super().get_many(*args, **kwargs):
            yield job_id, meta | {"task_id": job_id}

    def read_meta(self, task_id: str, meta: dict[str, Any]) -> dict[str, Any]:
        """A result is of the job whose key it was found at, whatever id it carries."""
        return meta if meta["status"] == states.PENDING else meta | {"task_id": task_id}

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing: Celery would subscribe to the job's channel here, even if nobody will wait."""


class SentinelResultBackend(ResultBackend, SentinelBackend):
    """Results on the server that Sentinel names."""


def _check_meta(meta: Any) -> None:
    """Raise ValueError if this is no result map as Celery stores it."""
    if (
        not isinstance(meta, dict)
        or not isinstance(meta.get("status"), str)
        or not isinstance(meta.get("task_id"), str)
    ):
        raise ValueError("no map with a status and an id")
    if not isinstance(meta.get("children"), list | None) or not isinstance(meta.get("traceback"), str | None):
        raise ValueError("children or traceback of a wrong type")
    error = meta.get("result")
    if meta["status"] in states.PROPAGATE_STATES and not (
        isinstance(error, dict)
        and isinstance(error.get("exc_type"), str)
        and len(error["exc_type"]) <= _MAX_NAME_LENGTH
    ):
        raise ValueError("an error without a class")


def _is_known_error(module: Any, name: Any) -> bool:
    """Returns True if a loaded module holds an Exception of this name, without asking the module to make one."""
    if not isinstance(module, str) or not isinstance(name, str):
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return isinstance(found, type) and issubclass(found, Exception)
