"""Acknowledgements that other threads ask for: made by the event loop, many at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import redis
from kombu.asynchronous import set_event_loop

from embedq.workers.broker.in_flight import QoS
from tests.consuming import Consuming, calls, in_flight, send

QUEUE = "acks"


@pytest.fixture
def client(delivery_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(delivery_url) as client:
        client.flushall()
        client.config_resetstat()
        yield client


def test_jobs_done_on_other_threads_are_acknowledged_together_at_the_next_turn(
    client: redis.Redis, delivery_url: str
) -> None:
    send(delivery_url, QUEUE, *range(20))
    with Consuming(delivery_url, [QUEUE]) as worker:
        worker.run_until(lambda: len(worker.got) == 20)
        before = calls(client, "zrem")
        thread = threading.Thread(target=lambda: [QoS.acknowledge_soon(message.ack) for message in worker.got])
        thread.start()
        thread.join()
        assert in_flight(client) == 20
        worker.run_until(lambda: in_flight(client) == 0)
        assert calls(client, "zrem") == before + 1


def test_the_loop_is_woken_once_for_them_and_again_after_its_turn(client: redis.Redis, delivery_url: str) -> None:
    send(delivery_url, QUEUE, 1, 2, 3)
    with Consuming(delivery_url, [QUEUE]) as worker:
        worker.run_until(lambda: len(worker.got) == 3)
        worker.turn()
        assert not worker.hub._ready  # what makes the loop go on instead of waiting for the server
        for message in worker.got[:2]:
            QoS.acknowledge_soon(message.ack)
        assert len(worker.hub._ready) == 1
        worker.turn()
        QoS.acknowledge_soon(worker.got[2].ack)
        assert len(worker.hub._ready) == 1


def test_one_that_fails_keeps_no_other_from_being_made(client: redis.Redis, delivery_url: str) -> None:
    send(delivery_url, QUEUE, 1, 2)
    with Consuming(delivery_url, [QUEUE]) as worker:
        worker.run_until(lambda: len(worker.got) == 2)
        for message in (worker.got[0], worker.got[0], worker.got[1]):  # the second time it is an error
            QoS.acknowledge_soon(message.ack)
        worker.run_until(lambda: in_flight(client) == 0)


def test_those_not_yet_made_are_made_before_a_channel_gives_its_jobs_back(
    client: redis.Redis, delivery_url: str
) -> None:
    send(delivery_url, QUEUE, 1, 2)
    with Consuming(delivery_url, [QUEUE]) as worker:
        worker.run_until(lambda: len(worker.got) == 2)
        QoS.acknowledge_soon(worker.got[0].ack)
    assert in_flight(client) == 0
    assert client.llen(QUEUE) == 1


def test_without_an_event_loop_nothing_is_left_to_it() -> None:
    set_event_loop(None)
    assert not QoS.acknowledge_soon(lambda: None)
