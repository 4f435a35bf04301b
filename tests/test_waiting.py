"""What a producer's waiting costs and survives: nothing until it waits, no result missed, nothing left behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from celery import Celery, group
from celery.exceptions import TimeoutError as CeleryTimeoutError

from embedq.core.errors import InvalidInput
from embedq.tasks.result_backend import LateConsumer
from tests.own_server import OwnServer
from tests.running import ROOT
from tests.traced_jobs import CALLS, application, run

COMMANDS = ("lpush", "subscribe", "unsubscribe", "get", "mget", "del", "hgetall")


@contextmanager
def counted(own: OwnServer) -> Iterator[dict[str, int]]:
    """How often the server ran each of COMMANDS within the block, those that it did not run left out."""
    before = {name: own.count(name) for name in COMMANDS}
    made: dict[str, int] = {}
    yield made
    made.update({name: own.count(name) - before[name] for name in COMMANDS if own.count(name) != before[name]})


def channels(own: OwnServer) -> list[bytes]:
    return [name for name in own.client.pubsub_channels() if name.startswith(b"celery-task-meta-")]


def waiting(producer: Celery, job: Any) -> tuple[threading.Thread, list[Any]]:
    """Wait for a job on a thread of its own. The list gets what came of it, and whether nothing of it is left."""
    came: list[Any] = []

    def wait() -> None:
        try:
            came.append(job.get(timeout=20))
        except Exception as error:
            came.append(error)
        came.append(holds_nothing(producer.backend))

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, came


def holds_nothing(backend: Any) -> bool:
    consumer = backend.result_consumer
    wanted = getattr(consumer, "_wanted", ())  # Celery's own has none
    return not any((*backend._pending_results, backend._pending_messages, wanted, consumer.subscribed_to))


def until_subscribed(own: OwnServer, num_channels: int) -> None:
    """The server tells nobody when a client subscribes: watch what it is told."""
    poll = threading.Event()
    for _ in range(1000):
        if len(channels(own)) == num_channels:
            return
        poll.wait(0.01)
    raise AssertionError(f"{channels(own)} instead of {num_channels} channels")


def test_sending_costs_one_lpush_also_in_groups(producer: Celery, own: OwnServer) -> None:
    producer.send_task("embed_one", queue="embed")
    with counted(own) as made:
        jobs = [producer.send_task("embed_one", queue="embed") for _ in range(10)]
        jobs += group(producer.signature("embed_one") for _ in range(10))().results
    assert made == {"lpush": 20}


def test_our_tasks_cost_one_lpush_once_the_models_are_known(own: OwnServer) -> None:
    own.client.flushall()
    script = """
import json, os, redis, tasks
from embedq.tasks.models import Registry, Served
client = redis.Redis.from_url(os.environ["EMBEDQ_REDIS_URL"])
Registry(client).announce([Served("m", "/m", ["embed"], 8, 16, ["dense"], ["embed"])])
tasks.embed.delay(["x"])
def calls():
    return {name.removeprefix("cmdstat_"): stats["calls"] for name, stats in client.info("commandstats").items()}
before = calls()
for _ in range(5): tasks.embed.delay(["x"])
jobs = tasks.embed_many([["x"]] * 50)
after = calls()
print(json.dumps({name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name)}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "EMBEDQ_REDIS_URL": own.url},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made.pop("info") == 1
    assert made == {"lpush": 55}


def test_a_result_that_is_there_costs_one_get(app: Celery, producer: Celery, own: OwnServer) -> None:
    job = producer.AsyncResult(run(app, "embed_one", 5.0))
    with counted(own) as made:
        assert job.get(timeout=5).dense[0, 0] == 5.0
    assert made == {"get": 1}


def test_a_wait_is_one_subscription_without_polling(app: Celery, producer: Celery, own: OwnServer) -> None:
    job = producer.AsyncResult("job")
    with counted(own) as made:
        thread, came = waiting(producer, job)
        until_subscribed(own, 1)
        run(app, "embed_one", 6.0, job_id="job")
        thread.join(20)
    assert came[0].dense[0, 0] == 6.0
    assert made == {"get": 1, "subscribe": 1, "mget": 1, "unsubscribe": 1}
    assert channels(own) == []


def test_a_group_is_one_subscription(app: Celery, producer: Celery, own: OwnServer) -> None:
    jobs = producer.GroupResult("g", [producer.AsyncResult(f"job-{index}") for index in range(50)])
    with counted(own) as made:
        thread, came = waiting(producer, jobs)
        until_subscribed(own, 50)
        with app.backend.batch():
            for index in range(50):
                run(app, "embed_one", index, job_id=f"job-{index}")
        thread.join(20)
    values, is_clean = came
    assert [value.dense[0, 0] for value in values] == list(range(50))
    assert is_clean
    assert made["subscribe"] == 1
    assert channels(own) == []


def test_only_what_is_waited_for_is_subscribed_to(app: Celery, producer: Celery, own: OwnServer) -> None:
    others = [producer.send_task("embed_one", queue="embed") for _ in range(20)]
    many = group(producer.signature("embed_one") for _ in range(5))()
    done = producer.AsyncResult(run(app, "embed_one"))
    with counted(own) as made:
        done.get(timeout=5)
    assert made == {"get": 1}
    del many
    with pytest.raises(CeleryTimeoutError):
        others[0].get(timeout=0.1)
    assert channels(own) == [f"celery-task-meta-{others[0].id}".encode()]


def test_a_result_that_is_published_again_is_not_kept(app: Celery, producer: Celery, own: OwnServer) -> None:
    thread, came = waiting(producer, producer.GroupResult("g", [producer.AsyncResult(name) for name in "ab"]))
    until_subscribed(own, 2)
    with own.client.pipeline() as pipe:
        for name in "aab":
            blob = app.backend.encode({"status": "SUCCESS", "result": name, "task_id": name})
            pipe.set(f"celery-task-meta-{name}", blob).publish(f"celery-task-meta-{name}", blob)
        pipe.execute()
    thread.join(20)
    assert came == [["a", "b"], True]


@pytest.mark.parametrize("is_stock", [False, True])
def test_failures_arrive_as_what_they_were(app: Celery, own: OwnServer, is_stock: bool) -> None:
    stock: dict[str, Any] = {"override_backends": {}} if is_stock else {}
    with application(own.url, is_worker=False, **stock) as producer:
        assert (type(producer.backend).__name__ == "RedisBackend") == is_stock
        thread, came = waiting(producer, producer.AsyncResult("job"))
        until_subscribed(own, 1)
        run(app, "fail", job_id="job")
        thread.join(20)
    assert isinstance(came[0], InvalidInput)


def test_a_result_stored_between_the_look_and_the_subscription_is_seen(
    app: Celery, producer: Celery, own: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe = LateConsumer._subscribe

    def late(consumer: LateConsumer) -> None:
        if consumer._wanted:
            run(app, "embed_one", 7.0, job_id="job")
        subscribe(consumer)

    monkeypatch.setattr(LateConsumer, "_subscribe", late)
    assert producer.AsyncResult("job").get(timeout=5).dense[0, 0] == 7.0


def test_a_result_stored_while_the_connection_is_lost_is_seen(app: Celery, producer: Celery, own: OwnServer) -> None:
    thread, came = waiting(producer, producer.AsyncResult("job"))
    until_subscribed(own, 1)
    with own.client.pipeline() as pipe:  # in one step: nobody hears it
        pipe.client_kill_filter(_type="pubsub")
        pipe.set("celery-task-meta-job", app.backend.encode({"status": "SUCCESS", "result": 8, "task_id": "job"}))
        pipe.execute()
    thread.join(20)
    assert came[0] == 8


def test_a_result_too_large_for_a_subscriber_is_read_from_its_key(
    app: Celery, producer: Celery, own: OwnServer
) -> None:
    thread, came = waiting(producer, producer.AsyncResult("job"))
    until_subscribed(own, 1)
    CALLS.append(lambda: np.zeros(40 * 1024 * 1024, np.uint8))  # the server cuts a subscriber off at 32 MiB
    run(app, "call", 0, job_id="job")
    thread.join(30)
    assert came[0].nbytes == 40 * 1024 * 1024


def test_forget_frees_the_key_and_the_subscription(app: Celery, producer: Celery, own: OwnServer) -> None:
    job = producer.AsyncResult("job")
    with pytest.raises(CeleryTimeoutError):
        job.get(timeout=0.1)
    assert len(channels(own)) == 1
    run(app, "embed_one", job_id="job")
    job.forget()
    until_subscribed(own, 0)
    assert own.client.dbsize() == 0
    assert holds_nothing(producer.backend)


def test_a_result_dropped_and_wanted_again_while_another_thread_subscribes_is_subscribed_to(
    producer: Celery, own: OwnServer
) -> None:
    consumer = producer.backend.result_consumer
    held, may_go = threading.Event(), threading.Event()

    def subscribe() -> None:
        with consumer.locked():
            held.set()
            assert may_go.wait(20)
            consumer._subscribe()

    thread = threading.Thread(target=subscribe)
    thread.start()
    assert held.wait(20)
    consumer.cancel_for("job")  # as a result object does that is collected
    consumer.consume_from("job")  # as one does that is made
    may_go.set()
    thread.join()
    assert channels(own) == [b"celery-task-meta-job"]
    consumer.cancel_for("job")
    until_subscribed(own, 0)


def test_results_that_nobody_asks_for_leave_nothing_behind(app: Celery, producer: Celery, own: OwnServer) -> None:
    jobs = [producer.send_task("embed_one", queue="embed") for _ in range(20)]
    many = group(producer.signature("embed_one") for _ in range(20))()
    for one in (*jobs, *many.results):
        run(app, "embed_one", job_id=one.id)
    many.get(timeout=5)
    del jobs, many, one
    gc.collect()
    assert channels(own) == []
    assert holds_nothing(producer.backend)


@pytest.mark.parametrize("is_early", [True, False], ids=["stored before", "stored after"])
def test_whoever_drains_is_told_of_what_was_asked_for_with_then(producer: Celery, app: Celery, is_early: bool) -> None:
    told: list[Any] = []
    if is_early:
        run(app, "embed_one", 3.0, job_id="job")
    producer.AsyncResult("job").then(told.append)
    producer.backend.result_consumer.drain_events(timeout=0.01)
    if not is_early:
        run(app, "embed_one", 3.0, job_id="job")
        producer.backend.result_consumer.drain_events(timeout=5)
    assert [job.id for job in told] == ["job"]
