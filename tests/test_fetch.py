"""Taking jobs: many in one atomic call, in kombu's order, within the worker's room, recorded as kombu does."""

from __future__ import annotations

import datetime
import json
import statistics
import threading
import time
from typing import Any

import kombu
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedq.celeryconfig import parts_queue
from embedq.workers.broker.leases import SCRIPT
from embedq.workers.broker.transport import wake
from embedq.workers.context import Room
from tests.consuming import OPTIONS, OURS, STOCK, Consuming, calls, context, dead_letters, in_flight, send, waiting


def test_one_call_takes_everything_most_urgent_first_and_then_queue_by_queue(url: str, client: redis.Redis) -> None:
    for queue, priority, numbers in [("b", 9, (6, 7)), ("a", 9, (4, 5)), ("b", 0, (2, 3)), ("a", 0, (0, 1))]:
        send(url, queue, *numbers, priority=priority)
    with Consuming(url, ["a", "b"]) as worker:
        worker.run_until(lambda: len(worker.got) == 8)
        assert worker.numbers() == [0, 1, 2, 3, 4, 5, 6, 7]
        assert calls(client, "eval", "evalsha") == 1 + calls(client, "zrange")  # and the look for expired leases
        assert in_flight(client) == 8


def test_a_thousand_jobs_take_two_calls_and_their_acknowledgements_as_many(url: str, client: redis.Redis) -> None:
    send(url, "a", *range(1000))
    with Consuming(url, ["a"], unacked_restore_interval=60) as worker:  # a sweep renews leases, on a slow machine
        worker.on_message = lambda message: (worker.got.append(message), worker.hub.call_soon(message.ack))
        client.config_resetstat()
        worker.run_until(lambda: len(worker.got) == 1000 and in_flight(client) == 0)
        assert worker.numbers() == list(range(1000))
        assert calls(client, "eval", "evalsha") - calls(client, "zrange") <= 4  # two, and looks at empty lists
        assert calls(client, "zrem") <= 3
        assert calls(client, "hdel") <= 6


@pytest.mark.parametrize(
    ("room", "taken"),
    [
        ({}, [0, 1, 2, 10, 11]),
        ({"max_jobs": 2}, [0, 1]),
        ({"max_jobs": 4}, [0, 1, 2, 10]),
        ({"max_priority": 3}, [0, 1, 2]),
        ({"max_bytes": 1}, [0]),  # one larger than the room must not wait for ever
        ({"max_bytes": 700}, [0, 1]),
        ({"max_jobs": 0}, []),
        ({"max_bytes": 0}, []),
    ],
)
def test_no_more_is_taken_than_there_is_room_for(
    url: str, client: redis.Redis, room: dict[str, int], taken: list[int]
) -> None:
    send(url, "a", 10, 11, priority=9)
    send(url, "a", 0, 1, 2)
    assert 2 * len(client.lindex("a", 0)) < 700 < 3 * len(client.lindex("a", 0))
    given = iter([Room(**room)])
    with Consuming(url, ["a"], worker=context(room=lambda: next(given, Room(max_jobs=0)))) as worker:
        worker.run_until(lambda: len(worker.got) >= len(taken) and worker.num_turns > 2)
        assert worker.numbers() == taken
        assert in_flight(client) == len(taken)


def test_the_prefetch_count_of_celery_bounds_what_is_held(url: str, client: redis.Redis) -> None:
    send(url, "a", *range(5))
    with Consuming(url, ["a"]) as worker:
        worker.consumer.qos(prefetch_count=2)
        worker.run_until(lambda: worker.num_turns > 3)
        assert worker.numbers() == [0, 1]
        worker.got[0].ack()
        worker.run_until(lambda: len(worker.got) == 3)
        assert in_flight(client) == 2


class Flood:
    """An interactive job more for each that is delivered, so that the interactive list is never empty; notes the order."""

    def __init__(self, url: str, queue: str = "a") -> None:
        self.order: list[tuple[str, int]] = []
        self._sender = kombu.Connection(url, transport_options=OPTIONS)
        self._producer = kombu.Producer(self._sender.channel())
        self._queue = queue
        for _ in range(4):
            self.send()

    def send(self) -> None:
        self._producer.publish(0, routing_key=self._queue, priority=0, serializer="json")

    def on_message(self, message: Any) -> None:
        self.order.append((message.delivery_info["routing_key"], message.payload))
        if message.payload == 0:
            self.send()
        message.ack()

    def close(self) -> None:
        self._sender.close()


def test_bulk_is_fetched_though_interactive_jobs_never_cease(url: str, client: redis.Redis) -> None:
    flood = Flood(url)
    send(url, "a", 1, 2, 3, 4, priority=9)
    bulk_bytes = len(client.lindex("a:9", 0))
    room = Room(max_jobs=2, batch_bytes=2 * bulk_bytes)
    with Consuming(url, ["a"], worker=context(room=lambda: room, max_bulk_wait_s=0.1)) as worker:
        worker.on_message = flood.on_message
        worker.run_until(lambda: [number for _, number in flood.order if number] == [1, 2, 3, 4])
    flood.close()
    numbers = [number for _, number in flood.order]
    # A batch's worth at a time, and interactive jobs between two of them.
    assert numbers.index(2) == numbers.index(1) + 1
    assert numbers.index(3) - numbers.index(2) > 2
    assert numbers[0] == 0


def test_no_bulk_is_fetched_first_for_which_there_is_no_room(url: str, client: redis.Redis) -> None:
    flood = Flood(url)
    send(url, "a", 1, priority=9)
    room = Room(max_jobs=2, max_priority=4)
    with Consuming(url, ["a"], worker=context(room=lambda: room, max_bulk_wait_s=1e-6)) as worker:
        worker.on_message = flood.on_message
        worker.run_until(lambda: len(flood.order) > 40)
    flood.close()
    assert client.llen("a:9") == 1


def test_a_queue_that_is_never_empty_starves_no_other_of_its_priority(url: str, client: redis.Redis) -> None:
    flood = Flood(url, "a")
    send(url, "b", 5)
    with Consuming(url, ["a", "b"], worker=context(room=lambda: Room(max_jobs=2))) as worker:
        worker.on_message = flood.on_message
        worker.run_until(lambda: ("b", 5) in flood.order)
    flood.close()


def test_a_worker_that_consumes_parts_alone_asks_for_none_until_there_is_room(url: str, client: redis.Redis) -> None:
    queue, parts = parts_queue("m"), [0]
    send(url, queue, 1)
    with Consuming(url, [queue], worker=context(room=lambda: Room(max_parts=parts[0]))) as worker:
        worker.run_until(lambda: worker.num_turns > 3)
        assert not worker.got
        parts[0] = 1
        wake()
        worker.run_until(lambda: worker.got)


def send_later(url: str, queue: str, seconds: float, *numbers: int, zone: datetime.tzinfo = datetime.UTC) -> None:
    """Send messages with an ETA, as Celery's producers write it."""
    with kombu.Connection(url, transport_options=OPTIONS) as connection:
        producer = kombu.Producer(connection.channel())
        for number in numbers:
            eta = (datetime.datetime.now(zone) + datetime.timedelta(seconds=seconds)).isoformat()
            producer.publish(number, routing_key=queue, serializer="json", headers={"eta": eta})


@pytest.mark.parametrize("zone_hours", [0, -5.5, 9])
def test_delayed_jobs_beyond_a_worker_s_share_keep_nobody_waiting(
    url: str, client: redis.Redis, zone_hours: float
) -> None:
    zone = datetime.timezone(datetime.timedelta(hours=zone_hours))
    send_later(url, "a", 3600, *range(100, 1300), zone=zone)
    send(url, "a", 1)
    taken = [0]
    with Consuming(url, ["a"], worker=context(room=lambda: Room(max_delayed=2 - taken[0]))) as worker:

        def note(message: Any) -> None:
            taken[0] += message.payload >= 100
            worker.got.append(message)

        worker.on_message = note
        worker.run_until(lambda: 1 in worker.numbers())
        assert worker.numbers() == [100, 101, 1]
        assert client.zcard("embedq:delayed") == client.hlen("embedq:delayed_jobs") == 1198
        assert (client.llen("a"), in_flight(client)) == (0, 3)
        # Room for delayed jobs is filled up, the earliest first: a worker without any would let them be forgotten.
        taken[0] = 0
        worker.run_until(lambda: len(worker.got) == 5)
        assert worker.numbers()[3:] == [102, 103]


def test_a_delayed_job_returns_as_its_time_comes_to_a_worker_that_may_hold_none(url: str, client: redis.Redis) -> None:
    send_later(url, "a", 4, 1)
    send_later(url, "a", 3, 2)
    send_later(url, "a", -1, 3)
    with Consuming(url, ["a"], worker=context(room=lambda: Room(max_delayed=0))) as worker:
        worker.run_until(lambda: len(worker.got) == 3)
        assert worker.numbers() == [3, 2, 1]
        assert in_flight(client) == 3
    assert (client.zcard("embedq:delayed"), client.hlen("embedq:delayed_jobs")) == (0, 0)


@pytest.mark.parametrize("eta", ["2099-13-45T99:99:99", "2099-01-01", "soon", 7, None, {"a": 1}, "2099-01-01T00:00:00"])
def test_an_eta_that_the_server_cannot_read_is_left_to_the_worker(url: str, client: redis.Redis, eta: Any) -> None:
    with kombu.Connection(url, transport_options=OPTIONS) as connection:
        producer = kombu.Producer(connection.channel())
        producer.publish(1, routing_key="a", serializer="json", headers={"eta": eta})
    with Consuming(url, ["a"], worker=context(room=lambda: Room(max_delayed=0))) as worker:
        worker.run_until(lambda: worker.got)
    assert not dead_letters(client)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.datetimes(datetime.datetime(1971, 1, 2), datetime.datetime(2199, 12, 30)), st.integers(-23 * 60, 23 * 60))
def test_the_server_reads_every_eta_as_python_does(
    url: str, client: redis.Redis, moment: datetime.datetime, zone_minutes: int
) -> None:
    eta = moment.replace(tzinfo=datetime.timezone(datetime.timedelta(minutes=zone_minutes)))
    source = SCRIPT[SCRIPT.index("-- Days from") : SCRIPT.index("-- Returns the delivery tag, the end")]
    found = client.eval(
        f"{source} return string.format('%.6f', eta_of({{headers = {{eta = ARGV[1]}}}}))", 0, eta.isoformat()
    )
    assert float(found) == pytest.approx(eta.timestamp(), abs=1e-5)


@pytest.mark.timing
def test_room_that_appears_in_another_thread_is_used_at_once(url: str, client: redis.Redis) -> None:
    room = [Room(max_jobs=0)]
    send(url, "a", 1)
    with Consuming(url, ["a"], worker=context(room=lambda: room[0]), unacked_restore_interval=60) as worker:
        worker.run_until(lambda: worker.num_turns > 3)
        assert not worker.got
        came: list[float] = []

        def make_room() -> None:
            room[0] = Room(max_jobs=1)
            came.append(time.perf_counter())
            wake()

        # Late enough for the loop to be waiting; that it is not woken for a second by anything else
        # is what the bound below shows.
        timer = threading.Timer(0.05, make_room)
        worker.turn()
        timer.start()
        worker.run_until(lambda: worker.got)
        timer.join()
        assert time.perf_counter() - came[0] < 0.5


def test_what_is_recorded_is_what_kombu_records(url: str, client: redis.Redis) -> None:
    records: list[Any] = []
    for transport in (STOCK, OURS):
        send(url, "a", 7, priority=3)
        raw = json.loads(client.lindex("a:3", 0))
        with Consuming(url, ["a"], transport) as worker:
            worker.run_until(lambda worker=worker: worker.got)  # type: ignore[misc]
            ((tag, value),) = client.hgetall("unacked").items()
            ((indexed, score),) = client.zrange("unacked_index", 0, -1, withscores=True)
            worker.got[0].ack()
        assert tag == indexed == raw["properties"]["delivery_tag"].encode()
        assert abs(score - time.time()) < 5
        message, exchange, routing_key = json.loads(value)
        assert message == raw
        records.append((exchange, routing_key, sorted(message), len(value)))
        client.flushall()
    assert records[0] == records[1]


def test_a_stock_worker_gives_back_and_acknowledges_what_ours_held(url: str, client: redis.Redis) -> None:
    send(url, "a", 1, 2)
    ours = Consuming(url, ["a"])
    ours.run_until(lambda: len(ours.got) == 2)
    ours.abandon()
    with Consuming(url, ["a"], STOCK, visibility_timeout=0.1, unacked_restore_limit=None) as stock:
        stock.run_until(lambda: len(stock.got) == 2)
        for message in stock.got:
            message.ack()
        assert client.hlen("unacked") == client.zcard("unacked_index") == client.llen("a") == 0


def test_whoever_only_asks_workers_something_takes_no_job_from_them(url: str, client: redis.Redis) -> None:
    send(url, "a", 1)
    with Consuming(url, ["a"]) as ours:
        ours.run_until(lambda: ours.got)
        # Flower and `inspect` are stock and take our settings; to a clock that is an hour ahead every lease is over.
        client.zadd("unacked_index", {client.zrange("unacked_index", 0, 0)[0]: time.time() - 3600})
        with Consuming(url, ["replies"], STOCK, unacked_restore_interval=0.05) as asking:
            client.config_resetstat()
            asking.run_until(lambda: calls(client, "zrange"))  # it did look
            asking.run_for(0.2)
        assert (in_flight(client), client.llen("a")) == (1, 0)


@pytest.mark.timing
def test_an_idle_worker_asks_once_a_second(url: str, client: redis.Redis) -> None:
    with Consuming(url, [f"queue-{number}" for number in range(6)], unacked_restore_interval=2) as worker:
        worker.run_for(0.5)
        client.config_resetstat()
        worker.num_turns = 0
        worker.run_for(4)
        assert 3 <= calls(client, "eval", "evalsha") <= 8  # a look a second, and one in two for expired leases
        assert worker.num_turns <= 5 * 4


def latencies_ms(url: str, transport: str) -> list[float]:
    """From just before a message is sent to its delivery, by a worker that was idle."""
    found = []
    with Consuming(url, ["a"], transport) as worker:
        worker.on_message = lambda message: (worker.got.append(time.perf_counter()), message.ack())
        for number in range(10):
            sent: list[float] = []
            timer = threading.Timer(
                0.01, lambda sent=sent, number=number: (sent.append(time.perf_counter()), send(url, "a", number))
            )
            timer.start()
            worker.run_until(lambda number=number: len(worker.got) > number)  # type: ignore[misc]
            timer.join()
            found.append(1000 * (worker.got[-1] - sent[0]))
    return found


@pytest.mark.timing
def test_being_told_of_a_job_adds_less_than_two_milliseconds(url: str, client: redis.Redis) -> None:
    found: dict[str, list[float]] = {STOCK: [], OURS: []}
    for _ in range(5):  # in turn, so that a slow moment of the machine meets both
        for transport, latencies in found.items():
            latencies += latencies_ms(url, transport)
    # Of the fast quarter: what the machine's other work adds to the rest is not ours.
    stock, ours = (statistics.quantiles(latencies)[0] for latencies in found.values())
    assert ours - stock < 2, f"latency {ours:.2f} ms, of stock kombu {stock:.2f} ms"


@pytest.mark.timing
def test_a_server_that_does_not_tell_is_asked_a_few_times_a_second(
    url: str, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    client.acl_setuser(
        "quiet",
        enabled=True,
        passwords=["+pw"],
        keys=["*"],
        channels=["*"],
        categories=["+@all"],
        commands=["-client|tracking"],
    )
    address = url.replace("redis://:", "redis://").partition("@")[2]
    with Consuming(f"redis://quiet:pw@{address}", ["a"], unacked_restore_interval=60) as worker:
        worker.run_for(0.3)
        assert "tracking_refused" in [getattr(record, "action", "") for record in caplog.records]
        client.config_resetstat()
        worker.run_for(2)
        assert 5 <= calls(client, "eval", "evalsha") <= 17  # of them some for cancelled jobs
        start_s = time.perf_counter()
        send(url, "a", 1)
        worker.run_until(lambda: worker.got)
        assert time.perf_counter() - start_s < 1


def test_a_server_that_forgot_the_script_or_is_out_of_memory_loses_nothing(url: str, client: redis.Redis) -> None:
    with Consuming(url, ["a"], unacked_restore_interval=60) as worker:
        send(url, "a", 1)
        worker.run_until(lambda: worker.got)
        client.script_flush()
        send(url, "a", 2)
        worker.run_until(lambda: len(worker.got) == 2)
        send(url, "b", 3)
        client.rename("b", "c")
        client.config_set("maxmemory", 1)
        try:
            client.rename("c", "a")
            worker.run_for(1.5)
            assert (len(worker.got), client.llen("a")) == (2, 1)
        finally:
            client.config_set("maxmemory", 0)
        worker.run_until(lambda: len(worker.got) == 3)
        assert worker.numbers() == [1, 2, 3]


def test_every_key_carries_the_prefix_of_the_installation(url: str, client: redis.Redis) -> None:
    send(url, "a", *range(4), global_keyprefix="here:")
    client.lpush("here:a", "no message")
    with Consuming(url, ["a"], global_keyprefix="here:") as worker:
        worker.run_until(lambda: len(worker.got) == 4)
        assert in_flight(client, "here:") == 4
        worker.got[0].ack()
        worker.run_until(lambda: in_flight(client, "here:") == 3)
    assert waiting(client, "here:a") == [1, 2, 3]
    assert client.xlen("here:embedq:dead") == 1
    assert all(key.startswith(b"here:") for key in client.scan_iter())


def test_a_consumer_that_never_acknowledges_leaves_nothing_in_flight(url: str, client: redis.Redis) -> None:
    send(url, "a", 1)
    with Consuming(url, ["b"]) as worker:
        worker.consumer.no_ack = True
        worker.consumer.add_queue(kombu.Queue("a", routing_key="a"))
        worker.consumer.consume()
        worker.run_until(lambda: worker.got)
        worker.run_until(lambda: in_flight(client) == 0)
    assert not dead_letters(client)
