"""Result backend of a producer: Celery's own on Redis, which subscribes only when somebody waits.

    job = tasks.embed.delay(texts)     one LPUSH; nothing is subscribed
    job.get()                          GET; and if it is not there: SUBSCRIBE, GET again, wait
    job.forget()                       DEL, and UNSUBSCRIBE if somebody had waited

Keys, blobs and channels are Celery's, so that stock producers and stock workers read and write the
same. What is read need not be what a worker wrote: it is checked here, and what is no result is the
failure of whoever waits for it, and of nobody else. Knows nothing of queues, models or batches.
"""

from __future__ import annotations

import ssl
import sys
import time
from collections.abc import Iterator
from typing import Any

import redis
from celery import states
from celery.backends.base import COMPRESSED_PAYLOAD_MAGIC
from celery.backends.redis import SentinelBackend
from celery.result import AsyncResult, ResultSet, result_from_tuple

from embedq.tasks.celery_private import ConsumerBase, ReadingBackend, known_meta

#: Keys asked for in one MGET: what arrives is held in memory at once.
_MAX_KEYS_PER_MGET = 100

#: Seconds the server may take to confirm a subscription, where no socket timeout is set.
_CONFIRM_TIMEOUT_S = 15.0

#: Characters of the name of an error's class that are believed.
_MAX_NAME_LENGTH = 200

#: How a server says that it is not ours to use: a wrong password, a user without rights.
_REFUSALS = (redis.AuthenticationError, redis.exceptions.AuthorizationError, redis.exceptions.NoPermissionError)


def is_refusal(error: BaseException) -> bool:
    """True for authentication, permission and certificate errors, which retrying cannot fix."""
    return isinstance(error, _REFUSALS) or isinstance(error.__context__, ssl.SSLCertVerificationError)


class LateConsumer(ConsumerBase):
    """Notes what may be waited for, and subscribes to it when somebody does.

    Celery subscribes when a job is sent, and for a group when its result object is made: a round
    trip for each, and channels that stay open if nobody ever waits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Keys of results that somebody holds and has not got, not yet subscribed to.
        self._wanted: set[bytes] = set()

    def consume_from(self, task_id: str) -> None:
        """Note that this result is wanted. Sends nothing."""
        self._wanted.add(self.key_of(task_id))

    def cancel_for(self, task_id: str) -> None:
        """Want it no more, and unsubscribe if need be."""
        self._wanted.discard(self.key_of(task_id))
        super().cancel_for(task_id)

    def on_wait_for_pending(self, result: Any, **options: Any) -> None:
        """Somebody waits from now on: take what is there, subscribe to what is not."""
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
        """Celery's; whoever drains waits, for what was asked for with `then` above all."""
        if self._wanted:
            with self.locked(), self.reconnect_on_error():
                self._subscribe()
        super().drain_events(timeout)

    def on_state_change(self, meta: dict[str, Any], message: Any) -> None:
        """Celery's, but what nobody waits for is not kept: its key is read when somebody does.

        A result that came over a channel is of the channel's job, whatever id it gives itself.
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
        """The parent's connection stays the parent's."""
        super().on_after_fork()
        self.subscription = None
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
        """Subscribe to all that is wanted, in one command.

        The keys are read after the server has confirmed: a result that is stored in between is
        then seen in one of the two places, whatever order the two connections are served in.
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
        for begin in range(0, len(keys), _MAX_KEYS_PER_MGET):
            self._read(keys[begin : begin + _MAX_KEYS_PER_MGET])

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
        """Celery's; a server that refuses us is not asked again."""
        return bool(super().exception_safe_to_retry(exc)) and not is_refusal(exc)

    def decode(self, payload: Any) -> Any:
        """Celery's, but nothing is inflated: no worker of ours compresses, and a few bytes could become gigabytes."""
        if isinstance(payload, bytes) and payload.startswith(COMPRESSED_PAYLOAD_MAGIC):
            raise ValueError("results are not compressed")
        return super().decode(payload)

    def decode_result(self, payload: Any) -> dict[str, Any]:
        """Celery's result map; a FAILURE that says so where the bytes are none."""
        try:
            meta = self.decode(payload)
            _check_meta(meta)
            for child in meta.get("children") or ():
                result_from_tuple(child, self.app)
            return dict(self.meta_from_decoded(meta))
        except Exception as error:  # of whatever kind: the bytes are anybody's
            reason = ValueError(f"what is stored for this job is no result ({type(error).__name__})")
            return {"status": states.FAILURE, "result": reason, "traceback": None, "children": [], "task_id": ""}

    def exception_to_python(self, exc: Any) -> Any:
        """Celery's, but a class is taken only from where it lies open, and only if it is an Exception.

        Celery follows a dotted name with getattr, which makes some modules import others, and raises
        whatever it finds there, SystemExit included.
        """
        if isinstance(exc, dict) and not _is_known_error(exc.get("exc_module"), exc.get("exc_type")):
            exc = exc | {"exc_module": None}  # Celery then makes a class of that name
        return super().exception_to_python(exc)

    def get_many(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Celery's; a result is of the key at which it was found."""
        for job_id, meta in super().get_many(*args, **kwargs):
            yield job_id, meta | {"task_id": job_id}

    def read_meta(self, task_id: str, meta: dict[str, Any]) -> dict[str, Any]:
        """A result is of the job whose key it was found at, whatever id it carries."""
        return meta if meta["status"] == states.PENDING else meta | {"task_id": task_id}

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Nothing: Celery would subscribe to the job's channel here, whether or not somebody will wait."""


class SentinelResultBackend(ResultBackend, SentinelBackend):
    """Results on the server that Sentinel names."""


def _check_meta(meta: Any) -> None:
    """ValueError if this is not what Celery stores for a job."""
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
    """Whether a loaded module holds an Exception of this name, without asking the module to make one."""
    if not isinstance(module, str) or not isinstance(name, str):
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return isinstance(found, type) and issubclass(found, Exception)
