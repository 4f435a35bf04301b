"""A worker without Celery: kombu's event loop, one connection, and a list of what was delivered."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kombu
import redis
from kombu.asynchronous import Hub, set_event_loop

from embedq import tasks
from embedq.workers import embedded
from embedq.workers.broker.transport import for_worker
from embedq.workers.context import Lifecycle, Room, WorkerContext
from embedq.workers.heartbeat_line import Beat

#: Our transport, for a worker of `context()`.
OURS = "ours"
STOCK = "kombu.transport.redis:Transport"

#: Seconds for anything that should happen at once, on a busy machine.
TIMEOUT_S = 20

#: As in production, but leases that a test can wait for. A test that needs one to run out takes less.
OPTIONS: dict[str, Any] = {
    **tasks.config.broker_transport_options,
    "visibility_timeout": 30,
    "unacked_restore_interval": 0.1,
}


def context(**fields: Any) -> WorkerContext:
    """A worker with room for everything, that computes nothing and is well; `fields` are those that differ."""
    usual = WorkerContext(
        name="consuming@test",
        process=f"consuming@test/{os.getpid()}",
        lifecycle=Lifecycle(),
        room=Room,
        max_bulk_wait_s=2.0,
        running=tuple,
        is_alive=lambda: True,
        cancel=lambda ids: {},
        fail=lambda message, error: None,
        end=lambda reason: None,
        last_beat=Beat,
    )
    return dataclasses.replace(usual, **fields)


@contextmanager
def own_server(directory: Path) -> Iterator[str]:
    """A server that nobody else uses, so that its counters count one test."""
    before = tasks.config.wire["data_dir"]
    tasks.config.wire["data_dir"] = str(directory)
    try:
        with embedded.server() as url:
            yield url
    finally:
        tasks.config.wire["data_dir"] = before


class Consuming:
    """Takes from `queues` with an event loop that the test turns; a context manager."""

    def __init__(
        self, url: str, queues: list[str], transport: str = OURS, worker: WorkerContext | None = None, **options: Any
    ) -> None:
        """`worker` is whose transport it is, by default that of `context()`; `options` are the transport's."""
        self.got: list[Any] = []
        self.num_turns = 0
        self.hub = set_event_loop(Hub())
        used = for_worker(worker or context())[0] if transport == OURS else transport
        self.connection = kombu.Connection(url, transport=used, transport_options=OPTIONS | options)
        self.channel = self.connection.channel()
        self.connection.transport.register_with_event_loop(self.connection.connection, self.hub)
        self.consumer = kombu.Consumer(
            self.channel,
            [kombu.Queue(name, routing_key=name) for name in queues],
            on_message=lambda message: self.on_message(message),
            auto_declare=False,
        )
        self.on_message: Callable[[Any], Any] = self.got.append
        self.consumer.consume()

    def __enter__(self) -> Consuming:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_until(self, condition: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
        """Turn the loop until `condition` holds. AssertionError after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s; {len(self.got)} messages came"
            self.turn()

    def run_for(self, seconds: float) -> None:
        """Turn the loop for so long."""
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            self.turn()

    def turn(self) -> None:
        """One turn: due callbacks, acknowledgements, a look for jobs, then at most a second's wait."""
        self.num_turns += 1
        self.hub.run_once()

    def numbers(self) -> list[int]:
        """What `send` numbered the delivered messages with."""
        return [message.payload for message in self.got]

    def abandon(self) -> None:
        """Go away as a killed process does: nothing acknowledged, nothing given back."""
        getattr(self.channel.qos, "taken", {}).clear()  # a stock worker has none
        self.channel.qos._delivered.clear()
        self.close()

    def close(self) -> None:
        self.connection.close()
        self.hub.close()


def send(url: str, queue: str, *numbers: int, priority: int = 0, **options: Any) -> None:
    """Send one message per number, as any Celery producer would: with stock kombu."""
    with kombu.Connection(url, transport_options=OPTIONS | options) as connection:
        producer = kombu.Producer(connection.channel())
        for number in numbers:
            producer.publish(number, routing_key=queue, priority=priority, serializer="json")


def calls(client: redis.Redis, *names: str) -> int:
    """How often the server ran these commands, with success, since `config_resetstat`."""
    stats = client.info("commandstats")
    found = [stats.get(f"cmdstat_{name}", {"calls": 0, "failed_calls": 0}) for name in names]
    return sum(one["calls"] - one["failed_calls"] for one in found)


def in_flight(client: redis.Redis, prefix: str = "") -> int:
    """Jobs in flight; the records must agree, but for jobs that wait for another attempt."""
    with client.pipeline() as pipe:
        pipe.hlen(f"{prefix}unacked").zcard(f"{prefix}unacked_index").hlen(f"{prefix}embedq:jobs")
        unacked, indexed, recorded = pipe.execute()
    assert unacked == indexed <= recorded, "the records of jobs in flight disagree"
    return int(unacked)


def waiting(client: redis.Redis, key: str) -> list[int]:
    """Numbers of the messages in a list, the next to be taken first."""
    return [int(_body(raw)) for raw in reversed(client.lrange(key, 0, -1))]


def _body(raw: bytes) -> bytes:

    return base64.b64decode(json.loads(raw)["body"])


def dead_letters(client: redis.Redis) -> list[dict[str, str]]:
    """Every dead letter, the oldest first."""
    letters = client.xrange("embedq:dead")
    return [{name.decode(): value.decode(errors="replace") for name, value in letter.items()} for _, letter in letters]
