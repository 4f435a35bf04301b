"""Jobs in flight: acknowledged together by the event loop, whatever thread asks; given back in every kind of trouble."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kombu
import pytest
import redis
from kombu.asynchronous import set_event_loop

from embedq.workers.broker.in_flight import InFlight, QoS
from embedq.workers.broker.leases import renew
from tests.consuming import Consuming, calls, context, in_flight, send, waiting

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
        assert in_flight(client) == 3
        worker.turn()
        assert in_flight(client) == 1, "the loop was woken, and made none of them"
        QoS.acknowledge_soon(worker.got[2].ack)
        assert len(worker.hub._ready) == 1
        worker.turn()
        assert in_flight(client) == 0


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


def test_a_loop_that_was_reset_after_a_lost_connection_is_woken_again(client: redis.Redis, delivery_url: str) -> None:
    with Consuming(delivery_url, [QUEUE]) as worker:
        worker.hub.reset()  # as Celery does
        with kombu.Connection(delivery_url, transport=type(worker.connection.transport)) as another:
            another.transport.register_with_event_loop(another.connection, worker.hub)
            done: list[str] = []
            assert QoS.acknowledge_soon(lambda: done.append("done"))
            worker.channel.qos.flush()
            assert done == ["done"]


def test_without_an_event_loop_nothing_is_left_to_it() -> None:
    set_event_loop(None)
    assert not QoS.acknowledge_soon(lambda: None)


@contextmanager
def without_scripts(client: redis.Redis) -> Iterator[None]:
    """A server that answers and does nothing for us, as one that fails over."""
    client.execute_command("ACL", "SETUSER", "default", "-evalsha")
    try:
        yield
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+evalsha")


def close_within_patience(worker: Consuming) -> bool:
    thread = threading.Thread(target=worker.close, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


def test_a_channel_that_closes_with_a_rejection_it_cannot_send_ends(client: redis.Redis, delivery_url: str) -> None:
    send(delivery_url, QUEUE, 1)
    running: set[str] = {"held"}
    of_process = context(running=lambda: running)
    worker = Consuming(delivery_url, [QUEUE], worker=of_process)
    worker.run_until(lambda: worker.got)
    worker.got[0].headers["id"] = "held"
    worker.close()
    worker.got[0].reject(requeue=True)  # the connection was cut meanwhile, the next one sends it
    running.clear()
    successor = Consuming(delivery_url, ["another"], worker=of_process)
    with without_scripts(client):
        assert close_within_patience(successor)
    with Consuming(delivery_url, ["another"], worker=of_process) as last:
        last.run_until(lambda: not in_flight(client))
    assert waiting(client, QUEUE) == [1]


def test_a_give_back_that_fails_is_made_again(client: redis.Redis, delivery_url: str) -> None:
    send(delivery_url, QUEUE, 1)
    with Consuming(delivery_url, [QUEUE]) as worker:
        worker.run_until(lambda: worker.got)
        with without_scripts(client):
            worker.got[0].reject(requeue=True)  # as the answers thread does, whose result could not be stored
        assert in_flight(client) == 1
        worker.run_until(lambda: len(worker.got) == 2)  # it was given back, and is fetched again
        assert client.llen(QUEUE) + in_flight(client) == 1
    assert waiting(client, QUEUE) == [1]


def test_a_burial_that_fails_is_made_again(client: redis.Redis, delivery_url: str) -> None:
    send(delivery_url, QUEUE, 1)
    with Consuming(delivery_url, [QUEUE]) as worker:
        worker.run_until(lambda: worker.got)
        with without_scripts(client):
            worker.got[0].reject()
        worker.run_until(lambda: not in_flight(client))
    assert client.xlen("embedq:dead") == 1


def test_jobs_that_others_took_meanwhile_do_not_keep_a_channel_from_closing(
    client: redis.Redis, delivery_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(delivery_url, QUEUE, 1, 2, 3)
    late = Consuming(delivery_url, [QUEUE], visibility_timeout=0.01)
    late.run_until(lambda: len(late.got) == 3)
    time.sleep(0.02)  # an outage longer than the lease, by the server's clock
    with Consuming(delivery_url, [QUEUE], worker=context(process="another")) as heir:
        heir.channel.visibility_timeout = 0.01
        heir.channel.leases.give_back_expired()
        heir.channel.visibility_timeout = 30
        heir.run_until(lambda: len(heir.got) == 3)
        give_back = late.channel.leases.give_back

        def renewed_meanwhile(tags: list[str]) -> list[str]:
            thread = threading.Thread(target=renew, args=(late.channel,))
            thread.start()
            thread.join()
            return give_back(tags)

        monkeypatch.setattr(late.channel.leases, "give_back", renewed_meanwhile)
        late.channel.close()
        assert not late.channel.qos.taken
        late.close()
        assert in_flight(client) == 3  # the other's


def test_jobs_in_flight_are_removed_on_one_thread_while_another_looks_at_them() -> None:
    held, owner, is_over, has_looked = InFlight(), _Owner(), threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def look() -> None:
        try:
            while not is_over.is_set():
                assert len({tag for tag, _ in held.latest_first()}) <= 1000
                held.tags()
                has_looked.set()
        except BaseException as error:
            failed.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        looking = threading.Thread(target=look)
        looking.start()
        assert has_looked.wait(30)
        for _ in range(100):
            # Many of one kind: a look that misses one more and one less sees as many as before.
            for number in range(1000):
                held.add(str(number), owner)  # type: ignore[arg-type]
            for number in range(1000):
                held.remove(str(number))
    finally:
        is_over.set()
        looking.join()
        sys.setswitchinterval(before)
    assert failed == []


def test_what_is_reported_is_reported_once_whoever_takes_it() -> None:
    held, threads = InFlight(), []
    taken: list[list[str]] = [[] for _ in range(4)]
    for number in range(4000):
        held.add(str(number), _Owner())  # type: ignore[arg-type]
    is_over = threading.Event()

    def take(mine: list[str]) -> None:
        while not is_over.is_set() or held._acknowledged:
            mine.extend(held.take_acknowledged())

    for mine in taken:
        threads.append(threading.Thread(target=take, args=(mine,)))
        threads[-1].start()
    for number in range(4000):
        held.acknowledge([str(number)])
    is_over.set()
    for thread in threads:
        thread.join()
    assert sorted(int(tag) for mine in taken for tag in mine) == list(range(4000))
    assert not held


class _Owner:
    """A channel's QoS, as far as it is kept."""

    channel: Any = None
