"""The private names of Celery, kombu and redis-py that workers use, each behind a plain name.

A release of those may change any of them; `tests/test_celery_private.py` runs real objects and fails when one no longer
means what is promised here. What kombu calls on its subclasses is turned into methods with names of our own: a class
here overrides the private method, and our class overrides what that calls. Nothing here decides anything.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, Protocol

import kombu.transport
from celery import Task
from celery._state import _task_stack, get_current_task
from celery.app.task import Context
from celery.concurrency.base import BasePool
from celery.events.dispatcher import EventDispatcher
from celery.worker.request import Request
from kombu.transport import redis as stock
from kombu.transport import virtual

from embedq.tasks.result_backend import ResultBackend


class Consumer(Protocol):
    """The part of Celery's consumer, one for each worker, that steps and commands use."""

    app: Any
    pool: Any
    task_consumer: Any
    event_dispatcher: Any
    connection_errors: tuple[type[BaseException], ...]
    on_decode_error: Any
    on_invalid_task: Any


class ControlState(Protocol):
    """The argument that Celery passes to each remote-control command."""

    consumer: Consumer


class RedisChannel(Protocol):
    """The part of any of kombu's channels for Redis that names a queue's lists and connects to them."""

    #: A `redis.ConnectionPool`.
    pool: Any
    global_keyprefix: str
    priority_steps: list[int]


class PolledChannel(Protocol):
    """The part of a channel that the poller which watches it uses."""

    #: An `in_flight.QoS`.
    qos: Any
    active_queues: Collection[str]
    active_fanout_queues: Collection[str]


class PollerBase(stock.MultiChannelPoller):
    """kombu's poller, which watches the sockets of all channels of a connection."""

    @property
    def channels(self) -> Collection[PolledChannel]:
        """The open channels."""
        channels: Collection[PolledChannel] = self._channels
        return channels

    def watch_broadcasts(self, channel: PolledChannel) -> None:
        """Subscribe `channel` to its fanout exchanges, remote control above all, and watch that socket."""
        self._register_LISTEN(channel)

    def watch_queues(self, channel: PolledChannel) -> None:
        """Watch the socket of `channel` for jobs; calls its `ask_for_jobs` unless an answer is awaited."""
        self._register_BRPOP(channel)

    def read(self, fileno: int) -> None:
        """Let the channel read from this socket, if it is one that is watched."""
        if fileno in self._fd_to_chan:
            channel, kind = self._fd_to_chan[fileno]
            channel.handlers[kind]()


class ChannelBase(stock.Channel):
    """kombu's channel: asks for jobs, reads the answer and publishes by the methods that are abstract here."""

    #: kombu's name for the connection whose reply is awaited.
    _in_poll: Any = None

    @abstractmethod
    def ask_for_jobs(self) -> None:
        """Called at each turn of the event loop in which no answer is awaited. `awaits(connection)` if one is now."""

    @abstractmethod
    def read_jobs(self) -> bool:
        """Called when the watched socket has something to read. queue.Empty if no job came."""

    @abstractmethod
    def publish_broadcast(
        self, publish: Callable[..., None], exchange: str, message: dict[str, Any], routing_key: str, **options: Any
    ) -> None:
        """Called for each message to a fanout exchange; `publish` is kombu's own way, with the same arguments."""

    @abstractmethod
    def read_broadcast(self, read: Callable[[Any], Any], subscription: Any) -> Any:
        """Called when the subscription has something to read; `read` is kombu's own way."""

    @property
    def is_awaiting(self) -> bool:
        """True while an answer is awaited."""
        return bool(self._in_poll)

    def awaits(self, connection: Any) -> None:
        """An answer is awaited on `connection` from now on: no other question may be sent on it."""
        self._in_poll, self._brpop_sent_at = connection, monotonic()

    def has_answer(self) -> None:
        """The awaited answer is here, or will not come."""
        self._in_poll = None

    def renew_credentials(self) -> None:
        """To be called when an answer was read: sends credentials that expired while it was awaited."""
        self._flush_brpop_reauth()

    @property
    def is_closing(self) -> bool:
        """True once `close` was called."""
        return bool(self._closing)

    def begin_closing(self) -> None:
        """Deliver nothing from now on."""
        self._closing = True

    @property
    def opened_qos(self) -> Any:
        """The channel's QoS; None before its first use."""
        return self._qos

    def queues_in_order(self) -> list[str]:
        """The consumed queues in the order of the strategy."""
        return list(self._queue_cycle.consume(len(self.active_queues)))

    def note_delivery(self, queue: str) -> None:
        """A job of `queue` was delivered: the strategy may let another queue go first now."""
        self._queue_cycle.rotate(queue)

    def deliver(self, payload: Any, queue: str) -> None:
        """Hand a message, as kombu keeps it in lists, to the consumer of `queue`."""
        self.connection._deliver(payload, queue)

    def topics(self, exchange: str, routing_key: str) -> list[str]:
        """Channels of the server that a message to a fanout exchange is published on."""
        return list(self._get_publish_topics(exchange, routing_key))

    @property
    def is_read_by_caller(self) -> bool:
        """True while somebody without an event loop waits for messages."""
        return bool(self.connection.cycle._in_protected_read)

    def connection_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Called for each pool of connections; may change its options."""
        return options

    def reused_client(self, make: Callable[[], Any]) -> Any:
        """Called for each client that commands, publishing above all, are sent with."""
        return make()

    def _brpop_start(self, timeout: float | None = None) -> None:
        self.ask_for_jobs()

    def _brpop_read(self, **_: Any) -> bool:
        return self.read_jobs()

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **options: Any) -> None:
        self.publish_broadcast(super()._put_fanout, exchange, message, routing_key, **options)

    def _receive_one(self, c: Any) -> Any:
        return self.read_broadcast(super()._receive_one, c)

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        return self.connection_options(super()._connparams(asynchronous))

    def _create_client(self, asynchronous: bool = False) -> Any:
        make = super()._create_client
        return make(asynchronous=True) if asynchronous else self.reused_client(make)


class QoSBase(stock.QoS):
    """kombu's bookkeeping of the messages that a channel has delivered and that are not acknowledged."""

    @property
    def delivered(self) -> dict[str, Any]:
        """Messages by tag, those that are acknowledged until the next `append` included."""
        delivered: dict[str, Any] = self._delivered
        return delivered

    @property
    def settled(self) -> Collection[str]:
        """Tags of delivered messages that are acknowledged or rejected."""
        settled: Collection[str] = self._dirty
        return settled

    def hold(self, message: Any, tag: str) -> None:
        """Note a message as delivered, here alone: its record on the server is there already."""
        virtual.QoS.append(self, message, tag)

    def settle(self, tag: str) -> None:
        """Count it no longer as held, here alone."""
        self._quick_ack(tag)

    def finish_restoring(self) -> None:
        """Everything is given back: kombu need not do so as the process ends."""
        self._delivered.restored = True

    def cancel_restoring_at_exit(self) -> None:
        """Take back kombu's registration with the end of the process, which would keep the channel alive."""
        self._on_collect.cancel()


class MessageBase(virtual.Message):
    """kombu's message: its body is decoded once, at its first use."""

    def read_body(self, read: Callable[[], Any]) -> Any:
        """Called once, at the first use of the body; `read` is kombu's own way."""
        return read()

    def _decode(self) -> Any:
        return self.read_body(super()._decode)


class RequestBase(Request):
    """Celery's bookkeeping of a job."""

    @property
    def fields(self) -> dict[str, Any]:
        """The map that the tracer makes the task's `request` of; may be changed before the job is traced."""
        fields: dict[str, Any] = self._request_dict
        return fields

    def unschedule(self) -> None:
        """Take back its countdown: it is not handed to the pool any more."""
        if self._eta_timer_entry is not None:
            self._eta_timer_entry.cancel()
            self._eta_timer_entry.args = ()  # the timer keeps the entry until it is due, and with it the texts

    def when_revoked(self, reason: str) -> None:
        """Called once it is answered with REVOKED: "revoked", "terminated" or "expired"."""

    def _announce_revoked(self, reason: str, *rest: Any) -> None:
        super()._announce_revoked(reason, *rest)
        self.when_revoked(reason)

    def show_arguments_as(self, args: str, kwargs: str) -> None:
        """Replace what events, inspection and logs show of the arguments."""
        # Both places: events and logs read the one, the tracer's messages the other.
        self._argsrepr, self._kwargsrepr = args, kwargs
        self._request_dict |= {"argsrepr": args, "kwargsrepr": kwargs}


class PoolBase(BasePool):
    """Celery's pool of workers."""

    def inspected(self) -> dict[str, Any]:
        """Returns the fields that `inspect stats` shows of the pool."""
        return {}

    def _get_info(self) -> dict[str, Any]:
        return self.inspected()


class DispatcherBase(EventDispatcher):
    """Celery's dispatcher of events: buffers those of some groups, and publishes a buffer as one message."""

    def buffer_of(self, group: str) -> list[Any]:
        """Events of a group that wait for `flush`; may be appended to."""
        waiting: list[Any] = self._group_buffer[group]
        return waiting

    def publish_events(
        self, publish: Callable[..., Any], events: Any, producer: Any, *rest: Any, **options: Any
    ) -> Any:
        """Called for each message of one event or of a list; `publish` is Celery's own way, with the same arguments."""
        return publish(events, producer, *rest, **options)

    def _publish(self, event: Any, producer: Any, *rest: Any, **options: Any) -> Any:
        return self.publish_events(super()._publish, event, producer, *rest, **options)


class StoringBackend(ResultBackend):
    """A result backend that may make the stored map itself, and is called before errbacks."""

    def map_of(self, result: Any, state: str, traceback: Any, request: Context | None) -> dict[str, Any]:
        """The map that is stored for a result, but for the job's id."""
        made: dict[str, Any] = self._get_result_meta(result, state, traceback, request)
        return made

    def result_map(
        self, make: Callable[[], dict[str, Any]], result: Any, state: str, traceback: Any, request: Context | None
    ) -> dict[str, Any]:
        """Called for each result: the map that is stored, but for the job's id; `make` is Celery's own way."""
        return make()

    def before_errbacks(self) -> None:
        """Called before the errbacks of a failed job are sent or run."""

    def _get_result_meta(
        self, result: Any, state: str, traceback: Any, request: Context | None, *rest: Any, **options: Any
    ) -> dict[str, Any]:
        make = super()._get_result_meta
        return self.result_map(
            lambda: make(result, state, traceback, request, *rest, **options), result, state, traceback, request
        )

    def _call_task_errbacks(self, request: Context, exc: BaseException, traceback: Any) -> None:
        self.before_errbacks()
        super()._call_task_errbacks(request, exc, traceback)


def running_job() -> tuple[Task, Context] | None:
    """The job whose task this thread runs; None outside a job."""
    task = get_current_task()
    return (task, task.request_stack.top) if task is not None and task.request_stack.top is not None else None


@contextmanager
def running_again(task: Task, request: Context) -> Iterator[None]:
    """Be inside a job again: what is sent from here names it as its parent, as within Celery's tracer."""
    _task_stack.push(task)
    task.request_stack.push(request)
    try:
        yield
    finally:
        task.request_stack.pop()
        _task_stack.pop()


def context_of(message: Any, app: Any) -> Context:
    """The context of the job that a message holds, as its task would see it. Raises what a malformed message raises."""
    context: Context = Request(message, app=app)._context
    return context


def use_transport(scheme: str, transport: type) -> None:
    """Make `transport` that of every URL of this scheme in this process, whatever was used before."""
    kombu.transport.TRANSPORT_ALIASES[scheme] = lambda: transport
    kombu.transport._transport_cache.pop(scheme, None)


def list_key(channel: RedisChannel, queue: str, step: int) -> str:
    """The key of a queue's list for one priority step, the installation's prefix included."""
    named: Any = channel
    return f"{channel.global_keyprefix}{named._q_for_pri(queue, step)}"


def socket_of(connection: Any) -> Any:
    """The socket of one of redis-py's connections, another after each reconnect; None if it is not connected."""
    return connection._sock


def on_invalidation(connection: Any, handle: Callable[[Any], object]) -> None:
    """Call `handle` for each invalidation that the server sends on this connection; what it returns is read in place
    of an answer."""
    connection._parser.set_invalidation_push_handler(handle)
