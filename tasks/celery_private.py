"""The private names of Celery that producers need, each behind a plain name.

As `workers/celery_private.py` is for workers; `tests/test_celery_private.py` tries both on real objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

from celery import Celery
from celery.app.utils import Settings
from celery.backends.asynchronous import _waiting_on
from celery.backends.redis import RedisBackend, ResultConsumer
from celery.result import AsyncResult
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as stock
from kombu.utils.imports import symbol_by_name
from kombu.utils.json import dumps


class ConsumerBase(ResultConsumer):
    """Celery's consumer of results: one subscription for all results that a backend's callers wait for."""

    _pubsub: Any

    @property
    def subscription(self) -> Any:
        """The redis-py PubSub; None before the first subscription and after a fork."""
        return self._pubsub

    @subscription.setter
    def subscription(self, pubsub: Any) -> None:
        self._pubsub = pubsub

    @property
    def unsubscribing(self) -> set[bytes]:
        """Keys that nobody wants any more, and whose subscription is not ended yet."""
        unsubscribing: set[bytes] = self._pending_unsubscribe
        return unsubscribing

    @property
    def held(self) -> Iterable[MutableMapping[str, AsyncResult]]:
        """Results that somebody holds and that have not come, by id: those kept for good, and those held weakly."""
        held: Iterable[MutableMapping[str, AsyncResult]] = self._pending_results
        return held

    def is_waited_for(self, task_id: Any) -> bool:
        """Returns True if somebody waits for this result right now, and does not merely hold it."""
        return bool(_waiting_on(self._pending_results, task_id))

    def key_of(self, task_id: str) -> bytes:
        """The key and channel of a result."""
        key: bytes = self._get_key_for_task(task_id)
        return key

    def locked(self) -> AbstractContextManager[Any]:
        """Keep other threads from the subscription meanwhile."""
        locked: AbstractContextManager[Any] = self._locked()
        return locked

    def forget_locks(self) -> None:
        """Have new locks, in a forked process: a thread that does not exist here may have held the old ones."""
        self._reset_sync()

    def decoded(self, blob: bytes) -> Any:
        """The result map of a blob."""
        return self._decode_result(blob)

    def stop_waiting_for(self, meta: dict[str, Any]) -> None:
        """Unsubscribe from a result if it is ready."""
        self._maybe_cancel_ready_task(meta)

    def reconnect(self) -> None:
        """Called after the connection was lost: subscribe anew to all that is wanted."""
        super()._reconnect_pubsub()

    def _reconnect_pubsub(self) -> None:
        self.reconnect()


class ReadingBackend(RedisBackend):
    """Celery's backend, for reading."""

    def read_meta(self, task_id: str, meta: dict[str, Any]) -> dict[str, Any]:
        """Called with each result map that is read by id; returns the one that counts."""
        return meta

    def hold(self, job: AsyncResult) -> None:
        """Note that somebody on this thread holds `job`, so that its result is handed over when it comes."""
        self._add_pending_result(job.id, job)

    def id_of(self, channel: bytes) -> str:
        """The job whose results are published on this channel."""
        return str(self._strip_prefix(channel))

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        return self.read_meta(task_id, super()._get_task_meta_for(task_id))


class CheckedResult(AsyncResult):
    """Celery's result object, which looks at each result before it has it, whichever way the result came."""

    def checked(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Called with each result map that comes; returns the one that counts."""
        return meta

    def _maybe_set_cache(self, meta: dict[str, Any] | None) -> Any:
        return super()._maybe_set_cache(self.checked(meta) if meta else meta)


def known_meta(job: AsyncResult) -> dict[str, Any] | None:
    """The result map that a result object has got; None before that."""
    meta: dict[str, Any] | None = job._cache
    return meta


def set_meta(job: AsyncResult, meta: dict[str, Any]) -> None:
    """Let a result object have its result, as if it had read it itself; one that is not ready is passed over."""
    job._maybe_set_cache(meta)


def transport_options(backend: RedisBackend) -> dict[str, Any]:
    """The options by which a backend reaches its server."""
    options: dict[str, Any] = backend._transport_options
    return options


class PublishingChannel(stock.Channel):
    """kombu's channel of a producer, which puts messages for some queues by a method of its own."""

    def takes(self, queue: str) -> bool:
        """Returns True for queues whose messages `put` puts; those of others go as in kombu."""
        raise NotImplementedError

    def put(self, messages: Sequence[tuple[str, int, str]]) -> None:
        """Put messages, each with its queue and priority step, in their order."""
        raise NotImplementedError

    def list_key(self, queue: str, step: int) -> str:
        """The key of a queue's list for one priority step, the installation's prefix included."""
        return f"{self.global_keyprefix}{self._q_for_pri(queue, step)}"

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        if not self.takes(queue):
            super()._put(queue, message, **kwargs)
            return
        step = self.priority(self._get_message_priority(message, reverse=False))
        batch = kwargs.get("_publish_batch")
        if batch is None:
            self.put([(queue, step, dumps(message))])
        else:
            batch.add("put", queue, step, dumps(message))

    def create_publish_batch(self, max_size: int) -> Any:
        """kombu's batch of messages that are written together."""
        batch = super().create_publish_batch(max_size)
        batch.pipeline = _Writes(batch.pipeline, self)
        return batch


class _Writes:
    """The pipeline of a batch, with the messages that the channel puts itself: before the others."""

    def __init__(self, pipeline: Any, channel: PublishingChannel) -> None:
        self._pipeline, self._channel = pipeline, channel
        self._messages: list[tuple[str, int, str]] = []

    def put(self, *message: Any) -> None:
        self._messages.append(message)

    def execute(self) -> Any:
        messages, self._messages = self._messages, []
        if messages:
            self._channel.put(messages)
        return self._pipeline.execute()

    def reset(self) -> None:
        self._messages = []
        self._pipeline.reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)


def transport_with(scheme: str, channel: Callable[[type], type]) -> type:
    """kombu's transport for URLs of a scheme, with the class of channels that `channel` makes of kombu's."""
    base: Any = symbol_by_name(TRANSPORT_ALIASES[scheme])
    return type(base.__name__, (base,), {"Channel": channel(base.Channel)})


#: Variables of the environment that Celery puts above the settings of the same names.
CELERY_VARIABLES = (
    "CELERY_BROKER_URL",
    "CELERY_BROKER_READ_URL",
    "CELERY_BROKER_WRITE_URL",
    "CELERY_RESULT_BACKEND",
)


class OwnSettings(Settings):
    """Celery's settings, without the variables that Celery puts above them: they are another application's."""

    @property
    def broker_read_url(self) -> Any:
        return self.get("broker_read_url") or self.broker_url

    @property
    def broker_write_url(self) -> Any:
        return self.get("broker_write_url") or self.broker_url

    @property
    def broker_url(self) -> Any:
        return self.first("broker_url", "broker_host")

    @property
    def result_backend(self) -> Any:
        return self.first("result_backend")


class OwnCelery(Celery):
    """Celery's application, configured by its own settings alone."""

    _conf: Any
    _pool: Any
    _backend_cache: Any

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _make_own(self._conf)  # read lazily: Celery makes the object before it reads the settings

    def _load_config(self) -> Any:
        return _make_own(super()._load_config())

    def _warn_duplicate_task_name(self, *_: Any) -> None:
        """Do nothing: Celery copies tasks of all applications here, and one with the name of ours is right where it is.

        The first `embed` of any module `tasks.py` is called `tasks.embed`. Ours stays ours here, as theirs does there.
        """

    def drop_connections(self) -> None:
        """Connect anew from now on, for this thread's results and all threads' messages, as the settings say then."""
        self._pool = None
        self.amqp._producer_pool = None
        self._backend_cache = None
        self.drop_thread_backend()

    def drop_thread_backend(self) -> None:
        """Make this thread's result backend anew when it is needed."""
        with suppress(AttributeError):  # it has none
            del self._local.backend


def _make_own(conf: Any) -> Any:
    object.__setattr__(conf, "__class__", OwnSettings)  # an assignment would be a setting of that name
    return conf
