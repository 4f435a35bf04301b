"""What a worker's transport does about cancelled jobs: it hears of them also without room, and none is lost or runs later."""

from __future__ import annotations

import base64
import json
import operator
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import kombu
import pytest
import redis

from embedq.tasks import cancelling, steps
from embedq.workers.context import Room
from tests.consuming import OPTIONS, Consuming, calls, context, in_flight
from tests.echo_worker import app as echo


class Told:
    """A worker's answer to being told of cancelled jobs: it holds those in `held`."""

    def __init__(self, **held: str) -> None:
        self.held = held
        self.ids: list[str] = []

    def __call__(self, ids: Collection[str]) -> dict[str, str]:
        self.ids += ids
        return {job_id: self.held[job_id] for job_id in ids if job_id in self.held}


def send_jobs(url: str, queue: str, *ids: str, priority: int = 0, **options: Any) -> None:
    """Send a message for each job, as any Celery producer would."""
    with kombu.Connection(url, transport_options=OPTIONS | options) as connection:
        producer = kombu.Producer(connection.channel())
        for job_id in ids:
            producer.publish(
                job_id, routing_key=queue, priority=priority, serializer="json", headers={"lang": "py", "id": job_id}
            )


def cancel(*ids: str, wait_s: float = 0.0) -> dict[str, str]:
    return dict(steps.run(echo, cancelling.cancel(echo, ids, wait_s), cancelling.FAILED))


def waiting(client: redis.Redis, key: str) -> list[str]:
    """Ids of the messages in a list, the next to be taken first."""
    return [json.loads(base64.b64decode(json.loads(raw)["body"])) for raw in reversed(client.lrange(key, 0, -1))]


def got(worker: Consuming) -> list[str]:
    return [message.headers["id"] for message in worker.got]


@contextmanager
def consuming(url: str, told: Told, *queues: str, visibility_timeout: float = 30, **fields: Any) -> Iterator[Consuming]:
    """A worker of its own that has asked once which jobs are cancelled."""
    fields = {"process": str(uuid.uuid4())} | fields
    worker_of = context(cancel=told, **fields)
    with Consuming(url, list(queues), worker=worker_of, visibility_timeout=visibility_timeout) as worker:
        worker.run_until(lambda: worker.channel.qos.taken.cancelled_us != b"-1")
        yield worker


def test_a_worker_without_room_hears_of_each_cancelled_job(url: str, client: redis.Redis) -> None:
    told = Told(one="running", two="waiting")
    with consuming(url, told, "a", room=lambda: Room(max_jobs=0)) as worker:
        for job_id in ("one", "two", "three"):
            cancel(job_id)
            worker.run_until(partial(operator.contains, told.ids, job_id))
        assert cancel("one") == {"one": "done"}  # answered already
        assert client.hgetall("embedq:cancel_words") == {b"one": b"running", b"two": b"waiting"}
        assert client.ttl("embedq:cancel_words") > 0


def test_messages_of_cancelled_jobs_are_taken_out_of_the_middle_of_their_lists(url: str, client: redis.Redis) -> None:
    ids = [f"job {number}" for number in range(250)]
    send_jobs(url, "a", *ids)
    send_jobs(url, "a", "bulk", "other", priority=9)
    unwanted = [*ids[3:5], ids[120], ids[249], "bulk"]
    told, room = Told(), [Room(max_jobs=0)]
    with consuming(url, told, "b", "a", room=lambda: room[0]) as worker:
        cancel(*unwanted, "nobody's")
        worker.run_until(lambda: len(worker.got) == len(unwanted))
        assert sorted(got(worker)) == sorted(unwanted)
        assert set(told.ids) == {*unwanted, "nobody's"}
        assert in_flight(client) == len(unwanted)
        assert client.hgetall("embedq:cancel_words") == {job_id.encode(): b"waiting" for job_id in unwanted}
        left = [job_id for job_id in ids if job_id not in unwanted]
        assert (waiting(client, "a"), waiting(client, "a:9")) == (left, ["other"])
        for message in worker.got:
            message.ack()
        worker.run_until(lambda: in_flight(client) == 0)
        room[0] = Room()
        worker.run_until(lambda: len(worker.got) == len(unwanted) + len(left) + 1)
        assert got(worker)[len(unwanted) :] == [*left, "other"]


def test_more_cancelled_jobs_than_one_call_takes_are_taken_in_several(url: str, client: redis.Redis) -> None:
    ids = [f"job {number}" for number in range(600)]
    send_jobs(url, "a", *ids)
    told = Told()
    with consuming(url, told, "a", room=lambda: Room(max_jobs=0)) as worker:
        cancel(*ids)
        worker.run_until(lambda: len(worker.got) == 600)
    assert set(told.ids) == set(ids)


def test_of_several_workers_one_looks_for_a_cancelled_job(url: str, client: redis.Redis) -> None:
    send_jobs(url, "a", "kept")
    told = Told(), Told()
    no_room: dict[str, Any] = {"room": lambda: Room(max_jobs=0)}
    with consuming(url, told[0], "a", **no_room) as first:
        cancel("one")
        first.run_until(lambda: told[0].ids)
        read = calls(client, "lrange")
        assert read > 0
        with consuming(url, told[1], "a", **no_room) as second:
            cancel("two")
            second.run_until(lambda: told[1].ids)
            twice = calls(client, "lrange")
            first.run_until(lambda: told[0].ids == ["one", "two"])
            assert calls(client, "lrange") == twice > read


def test_a_job_cancelled_before_its_worker_died_is_told_as_cancelled_to_the_next(url: str, client: redis.Redis) -> None:
    send_jobs(url, "a", "one", "two", visibility_timeout=0.5)
    with Consuming(url, ["a"], visibility_timeout=0.5) as dead:
        dead.run_until(lambda: len(dead.got) == 2)
        dead.abandon()
    cancel("one")
    told = Told()
    with consuming(url, told, "a", visibility_timeout=0.5) as worker:
        worker.run_until(lambda: len(worker.got) == 2)
        assert told.ids == ["one"], "told as it arrived"
        assert client.hgetall("embedq:cancel_words") == {b"one": b"waiting"}


def test_a_cancelled_job_is_no_dead_letter_and_needs_no_worker_of_its_own(url: str, client: redis.Redis) -> None:
    send_jobs(url, "a", "one", "two", visibility_timeout=0.5)
    for _ in range(3):
        with Consuming(url, ["a"], visibility_timeout=0.5, unacked_restore_interval=0.05) as dead:
            dead.run_until(dead.got.__len__)
            dead.abandon()
    cancel("one", "two")
    told = Told()
    with consuming(url, told, "a", visibility_timeout=0.5) as worker:
        worker.run_until(lambda: len(worker.got) == 2)
    assert client.xlen("embedq:dead") == 0


def test_what_was_cancelled_while_a_connection_was_lost_is_heard_after_it(url: str, client: redis.Redis) -> None:
    told, process = Told(), str(uuid.uuid4())
    with consuming(url, told, "a", process=process):
        pass
    cancel("one")
    with consuming(url, told, "a", process=process) as again:
        again.run_until(lambda: told.ids)
    assert told.ids == ["one"]


def test_a_worker_that_starts_hears_of_no_earlier_ones(url: str, client: redis.Redis) -> None:
    cancel("before")
    told = Told()
    with consuming(url, told, "a") as worker:
        cancel("after")
        worker.run_until(lambda: told.ids)
    assert told.ids == ["after"]


def test_ids_that_are_kept_are_bounded_in_number_and_age(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancelling, "_MAX_KEPT", 3)
    cancel("one", "two")
    cancel("three", "four")
    assert client.zrange("embedq:cancelled", 0, -1) == [b"two", b"four", b"three"]
    client.zadd("embedq:cancelled", {"two": 1.0})
    cancel("five")
    assert client.zrange("embedq:cancelled", 0, -1) == [b"four", b"three", b"five"]


def test_jobs_that_are_cancelled_later_are_later_also_on_a_clock_that_was_set_back(client: redis.Redis) -> None:
    client.zadd("embedq:cancelled", {"of the future": 4e15})
    cancel("one")
    cancel("two")
    assert client.zrange("embedq:cancelled", 0, -1) == [b"of the future", b"one", b"two"]
