"""kombu's Redis transport, but it fetches many jobs in one atomic call and holds them by lease.

Stock kombu pops one message and only then records it as in flight; a worker killed between the two
loses it. Here a script on the server (`transport.lua`) does both, for as many messages as the worker
has room for. The lists and the records of jobs in flight are kombu's own, so that stock producers,
Flower and scalers see what they expect. Everything else, from TLS to remote control, is inherited.

What is private to kombu stands in `workers/celery_private.py`.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from queue import Empty
from typing import Any, ClassVar

import redis
from kombu.asynchronous import get_event_loop, set_event_loop
from kombu.exceptions import OperationalError
from kombu.transport import redis as stock
from kombu.utils.json import dumps, loads
from redis.exceptions import NoScriptError, OutOfMemoryError

from embedq.core.errors import ServerUnavailable
from embedq.workers.broker.dead_letters import Message, bury_poisoned, bury_undeliverable
from embedq.workers.broker.fetch import INVALIDATION, POLL_S, Fetch, Fetched, nothing
from embedq.workers.broker.in_flight import QoS
from embedq.workers.broker.leases import Leases
from embedq.workers.celery_private import ChannelBase, PollerBase, use_transport
from embedq.workers.context import WorkerContext

log = logging.getLogger(__name__)

#: Errors of the connection to the server. Anything else that a delivery raises is caused by the message.
BROKEN = (redis.ConnectionError, redis.TimeoutError, OSError, OperationalError)


class Poller(PollerBase):
    """Fetches jobs at each turn of the event loop if there is room; sends acknowledgements before it waits."""

    def on_poll_start(self) -> None:
        for channel in self.channels:
            channel.qos.flush()
            if channel.active_fanout_queues:
                self.watch_broadcasts(channel)
            if channel.active_queues:
                self.watch_queues(channel)

    def on_readable(self, fileno: int) -> None:
        # Unlike kombu's, whatever the room: the server also announces new messages when there is none.
        self.read(fileno)

    def get(self, callback: Any, timeout: float | None = None) -> None:
        """Fetch once without an event loop; `Empty` if nothing was delivered."""
        try:
            super().get(callback, min(POLL_S, timeout or POLL_S))
        finally:
            for channel in self.channels:
                channel.qos.flush()


class Channel(ChannelBase):
    """A channel that fetches as many jobs at once as the worker has room for."""

    QoS = QoS
    Message = Message
    _publisher: Any = None

    #: The worker that the jobs are for. Only the classes that `for_worker` makes have one.
    context: ClassVar[WorkerContext]

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
        #: Name of this process in leases and dead letters.
        self.worker = self.context.process
        self.fetch = Fetch(self)
        super().__init__(*args, **kwargs)

    @cached_property
    def leases(self) -> Leases:
        """The server's records of the jobs in flight."""
        return Leases(self)

    @property
    def ticks(self) -> bool:
        """True if an event loop, or whoever reads without one, will send acknowledgements soon."""
        return not self.closed and bool(self.connection.has_event_loop or self.is_read_by_caller)

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        (self._no_ack_queues.add if no_ack else self._no_ack_queues.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def close(self) -> None:
        """Give the jobs back while the connections are still open, then close."""
        self.begin_closing()
        if self.is_awaiting:
            with suppress(Empty, *BROKEN):  # jobs in the answer are given back with the others
                self.read_jobs()
            self.has_answer()
        if self.opened_qos is not None and not self.closed:
            self.opened_qos.restore_unacked_once()
        super().close()

    def connection_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Use RESP3: only then does the server announce changed lists on the same connection."""
        return {**options, "protocol": 3}

    def reused_client(self, make: Callable[[], Any]) -> Any:
        """Use one client for all: kombu makes one for each message it publishes, a tenth of a millisecond each."""
        if self._publisher is None or self._publisher.connection_pool is not self.pool:
            self._publisher = make()
        return self._publisher

    def publish_broadcast(
        self, publish: Callable[..., None], exchange: str, message: dict[str, Any], routing_key: str, **options: Any
    ) -> None:
        """Publish as kombu does, but do not escape a body in base64, as all events have."""
        if "_publish_batch" in options or message["properties"].get("body_encoding") != "base64":
            publish(exchange, message, routing_key, **options)
            return
        rest = {name: value for name, value in message.items() if name != "body"}
        envelope = f'{{"body": "{message["body"]}", {dumps(rest)[1:]}'
        with self.conn_or_acquire() as client:
            for topic in self.topics(exchange, routing_key):
                client.publish(topic, envelope)

    def ask_for_jobs(self) -> None:
        """Send a fetch if there is room and there may be jobs; `read_jobs` reads the answer."""
        connection = self.client.connection
        if self.fetch.ask(connection):
            self.awaits(connection)

    def read_jobs(self) -> bool:
        """Read what the server sent, invalidations and jobs, and deliver the jobs."""
        connection = self.client.connection
        try:
            while connection.can_read() or (self.is_closing and self.is_awaiting):
                answer = connection.read_response(push_request=True)
                if answer is not INVALIDATION:
                    self.has_answer()
                    self._take(answer)
        except NoScriptError:
            self.has_answer()
            self.fetch.forget_script()
        except OutOfMemoryError:  # nothing was taken; workers that finish jobs make room
            self.has_answer()
            log.error("the server is out of memory, no job can be fetched", extra={"action": "server_out_of_memory"})
        except BROKEN:
            connection.disconnect()
            raise
        finally:
            self.renew_credentials()
        if not self._deliver_arrived():
            raise Empty
        return True

    def read_broadcast(self, read: Callable[[Any], Any], subscription: Any) -> Any:
        """Read as kombu does, but log a message that cannot be read; kombu would end the worker."""
        try:
            return read(subscription)
        except (Empty, *BROKEN):
            raise
        except Exception as error:  # its words may quote the message
            extra = {"action": "control_message_refused", "error": type(error).__name__}
            log.warning("a remote-control message cannot be read", extra=extra)
            return None

    def _take(self, answer: list[Any]) -> None:
        jobs, cancelled = self.fetch.take(answer)
        for job in jobs:
            self.qos.taken.add(job.tag, self.qos)
            self._arrived.append(job)
        if cancelled and (words := self.context.cancel(cancelled)):
            self._say(words)

    def _say(self, words: Mapping[str, str]) -> None:
        try:
            self.leases.say(words)
        except redis.RedisError as error:  # whoever cancelled them waits in vain for a second; the jobs are gone
            log.warning("cancelled jobs cannot be reported", extra={"action": "words_lost", "error": repr(error)})

    def _deliver_arrived(self) -> int:
        """Deliver the fetched jobs; returns how many. A channel that closes keeps them, to give them back."""
        num_delivered = 0
        while self._arrived and not self.is_closing:
            job = self._arrived[0]
            try:
                self._deliver(job)
            except BROKEN:
                raise
            except ServerUnavailable as error:
                # The answer of a poisoned or a revoked job cannot be stored. The message is not at fault, and its
                # producer must get that answer: the job goes back, uncounted, until the server of results is there.
                raise redis.ConnectionError(f"no answer can be stored: {error}") from error
            except Exception as error:  # one message must not take down the worker
                bury_undeliverable(self, job, error)
            self._arrived.popleft()
            num_delivered += 1
            self.note_delivery(job.queue)
        return num_delivered

    def _deliver(self, job: Fetched) -> None:
        if len(job.deliveries) >= self.max_attempts and not job.is_cancelled:
            bury_poisoned(self, job)
            return
        payload = _read_envelope(job.raw)
        if job.deliveries:
            payload["headers"]["redelivered"] = True
            payload["properties"]["delivery_info"]["redelivered"] = True
        if job.is_cancelled:
            self.context.cancel([payload["headers"]["id"]])  # Celery drops it as it arrives
        self.deliver(payload, job.queue)
        if job.queue in self._no_ack_queues:
            self.qos.ack(job.tag)


def _read_envelope(raw: bytes) -> Any:
    """Decode like kombu's `loads`, but call its hook for each map only if the message has types that need it."""
    text = raw.decode()
    return loads(text) if '"__type__"' in text else json.loads(text)


class Transport(stock.Transport):
    """kombu's Redis transport with channels that take jobs in batches."""

    Channel = Channel

    #: Whether an event loop turns for the channels; else each acknowledgement is sent at once.
    has_event_loop = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)
        self.has_event_loop = True
        # Celery resets the loop after each lost connection, and kombu then names none: nobody could wake it any more.
        set_event_loop(loop)


class SentinelChannel(Channel, stock.SentinelChannel):
    """`Channel` behind Sentinel."""

    from_transport_options = (*stock.SentinelChannel.from_transport_options, *Channel.from_transport_options[-3:])


class SentinelTransport(Transport):
    """`Transport` behind Sentinel."""

    default_port = stock.SentinelTransport.default_port
    Channel = SentinelChannel


def for_worker(context: WorkerContext) -> tuple[type[Transport], type[SentinelTransport]]:
    """The transports whose channels take jobs for this worker: on one server, and behind Sentinel."""
    channel = type("Channel", (Channel,), {"context": context})
    behind_sentinel = type("SentinelChannel", (SentinelChannel,), {"context": context})
    return (
        type("Transport", (Transport,), {"Channel": channel}),
        type("SentinelTransport", (SentinelTransport,), {"Channel": behind_sentinel}),
    )


def install(context: WorkerContext) -> None:
    """Make these the transports of every `redis://`, `rediss://` and `sentinel://` URL in this process.

    Not through `broker_transport`: kombu then no longer looks at the URL's scheme, sends `rediss://`
    without TLS, and falls back to its own transport when it fails over to a second URL.
    """
    direct, behind_sentinel = for_worker(context)
    for scheme, transport in (("redis", direct), ("rediss", direct), ("sentinel", behind_sentinel)):
        use_transport(scheme, transport)


def wake() -> None:
    """Make the event loop fetch again at once. Any thread may call it, when room appears."""
    hub = get_event_loop()
    if hub is not None:
        hub.call_soon(nothing)
