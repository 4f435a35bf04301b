"""What the server knows of waiting work: the lists as the transport names them, and who works on them."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest
import redis
from kombu import Connection

from embedq import tasks
from embedq.core.settings import read_settings
from embedq.tasks.speeds import Speed, Speeds
from embedq.workers.broker import transport
from embedq.workers.celery_private import list_key
from embedq.workers.launcher.queue_lengths import BacklogSize, Look, keys, lengths
from embedq.workers.queues import likely_queues
from tests.consuming import context
from tests.own_server import OwnServer

QUEUE = "embed.counted"

TIMEOUT_S = 30.0


@pytest.fixture
def counted(server: str) -> Iterator[str]:
    """A queue that nobody reads, with a job of each priority and one more."""
    for priority in (0, 0, 3, 6, 9):
        tasks.app.send_task("tasks.embed", args=[["x"]], kwargs={"model": "counted"}, priority=priority)
    yield server
    with redis.Redis.from_url(server) as client:
        client.delete(*(f"{QUEUE}{suffix}" for suffix in ("", ":3", ":6", ":9")))


@pytest.mark.usefixtures("counted")
def test_jobs_of_all_priorities_are_counted() -> None:
    with tasks.app.connection_for_read() as connection:
        assert lengths(connection.channel(), [QUEUE, "embed.empty"]) == {QUEUE: 5, "embed.empty": 0}


@pytest.mark.parametrize("prefix", ["", "ours:"])
def test_the_lists_are_those_that_the_transport_empties(server: str, prefix: str) -> None:
    options = tasks.app.conf.broker_transport_options | {"global_keyprefix": prefix}
    ours = Connection(server, transport=transport.for_worker(context())[0], transport_options=options)
    with Connection(server, transport_options=options) as stock, ours:
        steps = ours.channel().priority_steps
        assert keys(stock.channel(), QUEUE) == [list_key(ours.channel(), QUEUE, step) for step in steps]


def test_an_outage_of_the_server_is_told_and_its_end_too(own: OwnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    own.client.flushall()
    monkeypatch.setattr(tasks.app, "connection_for_read", lambda: Connection(own.url))
    told: queue.SimpleQueue[Look | None] = queue.SimpleQueue()
    counting = BacklogSize([QUEUE], told.put)
    counting.start()
    try:
        assert told.get(timeout=TIMEOUT_S) == Look({QUEUE: 0})
        own.kill()
        while told.get(timeout=TIMEOUT_S) is not None:
            pass
        own.start()
        while told.get(timeout=TIMEOUT_S) is None:
            pass
    finally:
        counting.close()
        counting.join(TIMEOUT_S)
    assert not counting.is_alive()


def test_queues_are_those_of_the_models_and_the_defaults_that_settings_tell() -> None:
    one = {"a": "/a"}
    assert likely_queues(read_settings(models=one)) == dict.fromkeys(
        ["embed.a", "rerank.a", "embed_parts.a", "embed", "rerank"], "a"
    )
    assert list(likely_queues(read_settings(models=one, default_rerank="none"))) == [
        "embed.a",
        "rerank.a",
        "embed_parts.a",
        "embed",
    ]
    two = likely_queues(read_settings(models={"a": "/a", "b": "/b"}, default_rerank="b"))
    of_models = {f"{kind}.{alias}": alias for alias in "ab" for kind in ("embed", "rerank", "embed_parts")}
    assert two == {**of_models, "rerank": "b"}


def test_who_works_and_how_fast_is_told_with_the_queues(own: OwnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    own.client.flushall()
    monkeypatch.setattr(tasks.app, "connection_for_read", lambda: Connection(own.url))
    speeds = Speeds(own.client)
    speeds.publish("here", {"a": Speed(100.0, {"embed.a": 5.0})})
    speeds.publish("gone", {"b": Speed(7.0)})
    speeds.withdraw("gone")
    told: queue.SimpleQueue[Look | None] = queue.SimpleQueue()
    counting = BacklogSize(["embed.a"], told.put)
    counting.start()
    try:
        look = told.get(timeout=TIMEOUT_S)
        assert look is not None
        assert list(look.workers) == ["here"]
        assert look.latest == {"a": Speed(100.0, {"embed.a": 5.0}), "b": Speed(7.0)}
    finally:
        counting.close()
        counting.join(TIMEOUT_S)
