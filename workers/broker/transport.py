"""kombu's Redis transport with another way of taking jobs: many in one atomic call, held by lease.

Stock kombu pops one message and only then records it as in flight; a worker killed between the two
loses it. Here a script on the server (`transport.lua`) does both, for as many messages as the worker
has room for. The lists and the records of jobs in flight are kombu's own, so that stock producers,
stock workers, Flower and scalers see what they expect. Everything else, from TLS to remote control,
is inherited.

Of our files only this one and `workers/broker/in_flight.py` lean on kombu's private names;
`tests/test_transport.py` lists them.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import cached_property
from queue import Empty
from time import monotonic
from typing import Any, ClassVar

import kombu.transport
import redis
from kombu.asynchronous import get_event_loop
from kombu.exceptions import OperationalError
from kombu.transport import redis as stock
from kombu.utils.json import dumps, loads
from redis.exceptions import NoScriptError, OutOfMemoryError

from embedq.core.errors import Poisoned
from embedq.workers.broker.dead_letters import Message, bury_poisoned, bury_undeliverable
from embedq.workers.broker.fetch import INVALIDATION, POLL_S, Fetch, Fetched, Room, nothing
from embedq.workers.broker.in_flight import QoS
from embedq.workers.broker.leases import Leases

log = logging.getLogger(__name__)

#: Errors of the connection to the server. Anything else that a delivery raises is the message's fault.
BROKEN = (redis.ConnectionError, redis.TimeoutError, OSError, OperationalError)


class Poller(stock.MultiChannelPoller):
    """Looks for jobs at each tick where there is room; acknowledges before it waits."""

    def on_poll_start(self) -> None:
        for channel in self._channels:
            channel.qos.flush()
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)
            if channel.active_queues:
                self._register_BRPOP(channel)

    def on_readable(self, fileno: int) -> None:
        # Unlike kombu's, whatever the room: the server also tells of new messages when there is none.
        if fileno in self._fd_to_chan:
            channel, kind = self._fd_to_chan[fileno]
            channel.handlers[kind]()

    def get(self, callback: Any, timeout: float | None = None) -> None:
        """One look without an event loop; `Empty` where nothing was delivered."""
        try:
            super().get(callback, min(POLL_S, timeout or POLL_S))
        finally:
            for channel in self._channels:
                channel.qos.flush()


class Channel(stock.Channel):
    """A channel that takes as many jobs at once as the worker has room for."""

    QoS = QoS
    Message = Message
    #: kombu's name for the connection whose reply is awaited.
    _in_poll: Any = None
    _publisher: Any = None

    #: Asked before each fetch: how much the worker takes now. Set by the worker.
    room: ClassVar[Callable[[], Room]] = Room

    #: Given the message and the error of a poisoned job, tells its producer. Set by the worker.
    fail: ClassVar[Callable[[Any, Poisoned], None]] = lambda message, error: None

    #: Ids of the jobs being computed. They are kept when the connection breaks, instead of given back
    #: and run twice; the worker must acknowledge or reject each in the end. Set by the worker.
    running: ClassVar[Callable[[], Collection[str]]] = tuple

    #: Name of this process in leases and dead letters.
    worker: ClassVar[str] = f"{socket.gethostname()}/{os.getpid()}"

    # Transport options of our own; the reasons for the values in use are in celeryconfig.py.
    max_attempts = 3
    max_message_bytes = 64 * 1024 * 1024
    max_dead_letters = 1000
    from_transport_options = (
        *stock.Channel.from_transport_options,
        "max_attempts",
        "max_message_bytes",
        "max_dead_letters",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._arrived: deque[Fetched] = deque()
        self._no_ack_queues: set[str] = set()
        self.fetch = Fetch(self)
        super().__init__(*args, **kwargs)

    @cached_property
    def leases(self) -> Leases:
        """The jobs in flight, as the server knows them."""
        return Leases(self)

    @property
    def ticks(self) -> bool:
        """Whether something will flush acknowledgements soon."""
        transport = self.connection
        return not self.closed and bool(transport.has_event_loop or transport.cycle._in_protected_read)

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        (self._no_ack_queues.add if no_ack else self._no_ack_queues.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def close(self) -> None:
        """Give everything back while the connections are still there, then close."""
        self._closing = True
        if self._in_poll:
            with suppress(Empty, *BROKEN):  # what the answer holds is given back with the rest
                self._brpop_read()
            self._in_poll = None
        if self._qos is not None and not self.closed:
            self._qos.restore_unacked_once()
        super().close()

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        # The server tells of changes on the same connection only in this protocol.
        return {**super()._connparams(asynchronous), "protocol": 3}

    def _create_client(self, asynchronous: bool = False) -> Any:
        """kombu's, which makes a client for each message it publishes, a tenth of a millisecond each."""
        if asynchronous:
            return super()._create_client(asynchronous=True)
        if self._publisher is None or self._publisher.connection_pool is not self.pool:
            self._publisher = super()._create_client()
        return self._publisher

    def _put_fanout(self, exchange: str, message: dict[str, Any], routing_key: str, **options: Any) -> None:
        """kombu's; a body in base64, as all events are, is not searched for what JSON must escape."""
        if "_publish_batch" in options or message["properties"].get("body_encoding") != "base64":
            super()._put_fanout(exchange, message, routing_key, **options)
            return
        rest = {name: value for name, value in message.items() if name != "body"}
        envelope = f'{{"body": "{message["body"]}", {dumps(rest)[1:]}'
        with self.conn_or_acquire() as client:
            for topic in self._get_publish_topics(exchange, routing_key):
                client.publish(topic, envelope)

    def queues_in_order(self) -> list[str]:
        """The consumed queues in the order of the strategy."""
        return list(self._queue_cycle.consume(len(self.active_queues)))

    def list_of(self, queue: str, step: int) -> str:
        """The key of a queue's list for one priority step."""
        return f"{self.global_keyprefix}{self._q_for_pri(queue, step)}"

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Where kombu asks for one message; the answer is read when it comes."""
        connection = self.client.connection
        if self.fetch.ask(connection):
            self._in_poll, self._brpop_sent_at = connection, monotonic()

    def _brpop_read(self, **_: Any) -> bool:
        """Read what the server sent, news of changed lists and jobs, and deliver the jobs."""
        connection = self.client.connection
        try:
            while connection.can_read() or (self._closing and self._in_poll):
                answer = connection.read_response(push_request=True)
                if answer is not INVALIDATION:
                    self._in_poll = None
                    self._take(answer)
        except NoScriptError:
            self._in_poll = None
            self.fetch.forget_script()
        except OutOfMemoryError:  # nothing was taken; workers that finish jobs make room
            self._in_poll = None
            log.error("the server is out of memory", extra={"action": "server_out_of_memory"})
        except BROKEN:
            connection.disconnect()
            raise
        finally:
            self._flush_brpop_reauth()
        if not self._deliver_arrived():
            raise Empty
        return True

    def _receive_one(self, c: Any) -> Any:
        """kombu's, for remote control; a message that cannot be read is logged, where it would end the worker."""
        try:
            return super()._receive_one(c)
        except (Empty, *BROKEN):
            raise
        except Exception as error:  # its words may quote the message
            extra = {"action": "control_message_refused", "error": type(error).__name__}
            log.warning("a message of remote control cannot be read", extra=extra)
            return None

    def _take(self, answer: list[Any]) -> None:
        for job in self.fetch.take(answer):
            self.qos.taken[job.tag] = self.qos
            self._arrived.append(job)

    def _deliver_arrived(self) -> int:
        """Hand over what was taken; returns how many. A channel that closes keeps it, to give it back."""
        num_delivered = 0
        while self._arrived and not self._closing:
            job = self._arrived[0]
            try:
                self._deliver(job)
            except BROKEN:
                raise
            except Exception as error:  # one message must not take down the worker
                bury_undeliverable(self, job, error)
            self._arrived.popleft()
            num_delivered += 1
            self._queue_cycle.rotate(job.queue)
        return num_delivered

    def _deliver(self, job: Fetched) -> None:
        if len(job.deliveries) >= self.max_attempts:
            bury_poisoned(self, job)
            return
        payload = _read_envelope(job.raw)
        if job.deliveries:
            payload["headers"]["redelivered"] = True
            payload["properties"]["delivery_info"]["redelivered"] = True
        self.connection._deliver(payload, job.queue)
        if job.queue in self._no_ack_queues:
            self.qos.ack(job.tag)


def _read_envelope(raw: bytes) -> Any:
    """kombu's `loads`, but its hook, called for each map of a message, only where there is something for it."""
    text = raw.decode()
    return loads(text) if '"__type__"' in text else json.loads(text)


class Transport(stock.Transport):
    """kombu's Redis transport with channels that take jobs in batches."""

    Channel = Channel

    #: Whether an event loop ticks for the channels; else each acknowledgement is sent at once.
    has_event_loop = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)
        self.has_event_loop = True


class SentinelChannel(Channel, stock.SentinelChannel):
    """The same behind Sentinel."""

    from_transport_options = (*stock.SentinelChannel.from_transport_options, *Channel.from_transport_options[-3:])


class SentinelTransport(Transport):
    """The same behind Sentinel."""

    default_port = stock.SentinelTransport.default_port
    Channel = SentinelChannel


def install() -> None:
    """Make this the transport of every `redis://`, `rediss://` and `sentinel://` URL in this process.

    Not through `broker_transport`: kombu then no longer looks at the URL's scheme, sends `rediss://`
    without TLS, and falls back to its own transport when it fails over to a second URL.
    """
    for scheme, name in (("redis", "Transport"), ("rediss", "Transport"), ("sentinel", "SentinelTransport")):
        kombu.transport.TRANSPORT_ALIASES[scheme] = f"{__name__}:{name}"
        kombu.transport._transport_cache.pop(scheme, None)


def wake() -> None:
    """Make the event loop look for jobs again at once; for any thread, when room appears."""
    hub = get_event_loop()
    if hub is not None:
        hub.call_soon(nothing)
