"""Queues that hold as much as they may: jobs are refused where they are sent, and none is lost or sent twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from embedq import tasks
from embedq.core.errors import QueueFull
from embedq.tasks.queue_cap import QueueCap
from embedq.tasks.speeds import Speed, Speeds
from tests.consuming import calls

Capped = Callable[..., None]


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    """The server whose lists `embed.capped` these tests fill, and nobody reads."""
    lists = [f"embed.capped{suffix}" for suffix in ("", ":3", ":6", ":9")]
    with redis.Redis.from_url(server) as one:
        one.delete(*lists)
        yield one
        one.delete(*lists)


@pytest.fixture
def capped(client: redis.Redis) -> Iterator[Capped]:
    """Sets the cap of this process."""

    def use(max_jobs: int = 0, max_bytes: int = 0) -> None:
        cap = QueueCap(max_jobs, max_bytes)
        tasks.app.cap = cap if any(cap) else None
        tasks.app.drop_connections()

    yield use
    use()


def send(text: str = "a text", **sending: Any) -> Any:
    return tasks.embed.apply_async(([text],), queue="embed.capped", **sending)


def num_queued(client: redis.Redis) -> int:
    return sum(client.llen(f"embed.capped{suffix}") for suffix in ("", ":3", ":6", ":9"))


def test_the_job_beyond_the_cap_is_refused_with_the_size_and_the_limit(client: redis.Redis, capped: Capped) -> None:
    capped(max_jobs=3)
    for _ in range(3):
        send()
    with pytest.raises(
        QueueFull,
        match=r"queue embed\.capped holds 3 jobs of this class, and at most 3 jobs \(EMBEDQ_MAX_QUEUED_JOBS\); 1 more of",
    ):
        send()
    assert num_queued(client) == 3
    assert [send(priority=priority).id is not None for priority in (9, 6, 7)] == [True] * 3  # bulk counts apart
    with pytest.raises(QueueFull, match="holds 3 jobs of this class"):
        send(priority=9)


def test_producers_that_send_at_once_never_exceed_the_cap(client: redis.Redis, capped: Capped) -> None:
    capped(max_jobs=100)
    sent, refused = [], []

    def produce() -> None:
        for _ in range(10):
            try:
                sent.append(send().id)
            except QueueFull as error:
                refused.append(error)

    threads = [threading.Thread(target=produce) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (num_queued(client), len(sent), len(refused)) == (100, 100, 400)


def test_a_cap_of_bytes_counts_what_the_server_holds_and_an_empty_queue_takes_any_job(
    client: redis.Redis, capped: Capped
) -> None:
    capped(max_bytes=50_000)
    send("x" * 60_000)
    with pytest.raises(QueueFull, match=r"holds 1 job of [\d,]+ bytes of this class, and at most 50,000 bytes"):
        send()
    client.delete("embed.capped")
    while (client.memory_usage("embed.capped") or 0) < 45_000:
        send("y" * 1_000)
    with pytest.raises(QueueFull):
        send("y" * 5_000)
    assert 20 <= num_queued(client) <= 40


def test_of_many_jobs_those_that_fit_are_sent_and_told(client: redis.Redis, capped: Capped) -> None:
    capped(max_jobs=10)
    send()
    batches = [[f"text {number}"] for number in range(25)]
    with pytest.raises(QueueFull) as full:
        tasks.embed_many(batches, {"queue": "embed.capped"})
    assert (full.value.jobs, num_queued(client)) == ([], 1)
    client.delete("embed.capped")
    with pytest.raises(QueueFull, match="10 more") as full:
        tasks.embed_many(batches, {"queue": "embed.capped"})
    assert (len(full.value.jobs), num_queued(client)) == (10, 10)


@pytest.mark.parametrize(
    "send_some",
    [lambda: [send(block_s=20)], lambda: tasks.embed_many([["a"]], {"queue": "embed.capped", "block_s": 20})],
    ids=["one", "many"],
)
def test_a_sender_waits_for_room(client: redis.Redis, capped: Capped, send_some: Callable[[], list[Any]]) -> None:
    capped(max_jobs=1)
    first = send()
    sent: list[Any] = []
    waiting = threading.Thread(target=lambda: sent.extend(send_some()))
    waiting.start()
    assert num_queued(client) == 1
    assert client.brpop(["embed.capped"], 20)
    waiting.join(20)
    assert num_queued(client) == len(sent) == 1
    assert sent[0].id != first.id


def test_a_sender_waits_no_longer_than_it_wants(client: redis.Redis, capped: Capped) -> None:
    capped(max_jobs=1)
    send()
    began_s = time.monotonic()
    with pytest.raises(QueueFull):
        send(block_s=0.2)
    assert time.monotonic() - began_s >= 0.2


def test_the_error_says_when_there_will_be_room(client: redis.Redis, capped: Capped) -> None:
    capped(max_jobs=1)
    send()
    speeds = Speeds(client)
    speeds.publish("fast@here", {"capped": Speed(50.0, {"embed.capped": 100.0})})
    speeds.publish("slow@here", {"capped": Speed(10.0, {"embed.capped": 140.0})})
    try:
        with pytest.raises(QueueFull) as full:
            send()
    finally:
        for name in ("fast@here", "slow@here"):
            speeds.withdraw(name)
    assert full.value.retry_after_s == pytest.approx(120 / 60)  # one job of 120 tokens, by both


def test_a_job_costs_one_call_with_a_cap_as_without(client: redis.Redis, capped: Capped) -> None:
    capped(max_jobs=1_000)
    send()  # connects, and the server learns the script
    before = calls(client, "evalsha"), calls(client, "lpush")
    for _ in range(5):
        send()
    within = calls(client, "evalsha"), calls(client, "lpush")
    assert (within[0] - before[0], within[1] - before[1]) == (5, 5)  # the script's own LPUSH counts as well
    capped()
    send()
    before = calls(client, "evalsha"), calls(client, "lpush")
    send()
    assert (calls(client, "evalsha") - before[0], calls(client, "lpush") - before[1]) == (0, 1)


def test_jobs_of_a_map_count_as_one(client: redis.Redis, capped: Capped) -> None:
    capped(max_jobs=1)
    tasks.embed.map([["a"], ["b"]]).apply_async(queue="embed.capped")
    with pytest.raises(QueueFull):
        tasks.embed.map([["a"]]).apply_async(queue="embed.capped", block_s=0.1)
