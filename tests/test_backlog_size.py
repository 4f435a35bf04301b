"""What waits: the lists as the transport names them, and their jobs in tokens."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest
import redis
from kombu import Connection

import tasks
from core.settings import read_settings
from tests.own_server import OwnServer
from workers import transport
from workers.backlog_size import BacklogSize, keys, lengths, queues_of, waiting_tokens
from workers.beats import Beat

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
    ours = Connection(server, transport=transport.Transport, transport_options=options)
    with Connection(server, transport_options=options) as stock, ours:
        steps = ours.channel().priority_steps
        assert keys(stock.channel(), QUEUE) == [ours.channel().list_of(QUEUE, step) for step in steps]


def test_an_outage_of_the_server_is_told_and_its_end_too(own: OwnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.app, "connection_for_read", lambda: Connection(own.url))
    told: queue.SimpleQueue[dict[str, int] | None] = queue.SimpleQueue()
    counting = BacklogSize([QUEUE], told.put)
    counting.start()
    try:
        assert told.get(timeout=TIMEOUT_S) == {QUEUE: 0}
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
    assert queues_of(read_settings(models=one)) == ["embed.a", "rerank.a", "embed", "rerank"]
    assert queues_of(read_settings(models=one, default_rerank="none")) == ["embed.a", "rerank.a", "embed"]
    two = queues_of(read_settings(models={"a": "/a", "b": "/b"}, default_rerank="b"))
    assert two == ["embed.a", "rerank.a", "embed.b", "rerank.b", "rerank"]


def test_a_job_counts_as_those_of_its_queue_did_lately() -> None:
    beats = [
        Beat(waiting_tokens=100, tokens_per_job={"embed": 10.0, "rerank": 1000.0}),
        Beat(waiting_tokens=50, tokens_per_job={"embed": 30.0}),
    ]
    assert waiting_tokens({"embed": 3, "rerank": 2}, beats) == 150 + 3 * 20 + 2 * 1000
    assert waiting_tokens({"embed.other": 2}, beats) == 150 + 2 * 510
    assert waiting_tokens({"embed": 0}, []) == 0


def test_before_any_job_is_answered_jobs_count_as_those_held_and_else_are_unknown() -> None:
    assert waiting_tokens({"embed": 10}, [Beat(num_held=4, waiting_tokens=400)]) == 400 + 10 * 100
    assert waiting_tokens({"embed": 10}, [Beat()]) is None
    assert waiting_tokens({"embed": 10}, []) is None
    assert waiting_tokens({"embed": 0}, [Beat()]) == 0
