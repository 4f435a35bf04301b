"""Estimates of when jobs are done: by hand on known numbers, by a real worker, and by their errors."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pytest
import redis
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from embedq import tasks
from embedq.core.errors import InvalidInput, ServerUnavailable
from embedq.tasks import estimating, steps
from embedq.tasks.estimating import Pool, Waiting, ahead_s, left_of, tokens_of
from embedq.tasks.models import Served
from embedq.tasks.speeds import Load, Report, Speed, Speeds
from tests import bulk
from tests.events import TIMEOUT_S, Events
from tests.own_server import OwnServer

MODELS = {
    "m": Served("m", "/m", ["embed"], 8, 16, ["dense"], ["embed"]),
    "other": Served("other", "/o", ["rerank"], 8, 16, ["dense"], ["rerank"]),
}
QUEUES = {"embed": "m", "embed.m": "m", "rerank.other": "other"}

#: 100 tokens a second, 10 tokens a job, 2 a text, a half a character.
SPEED = Speed(100.0, {"embed": 10.0}, {"embed": 2.0}, {"embed": 0.5})


def pool(*loads: Load, models: tuple[str, ...] = ("m",), speed: Speed = SPEED) -> Pool:
    """One worker for each load."""
    speeds = dict.fromkeys(models, speed)
    return Pool(
        1_000.0, {str(n): Report(1_000.0, speeds, "", load) for n, load in enumerate(loads)}, {"m": SPEED}, MODELS
    )


def test_what_waits_and_what_workers_hold_is_divided_among_them() -> None:
    waiting = [Waiting("embed", 0, 30), Waiting("embed.m", 9, 10)]
    assert ahead_s(pool(Load()), "m", QUEUES, waiting, is_bulk=True) == pytest.approx(4.0)
    assert ahead_s(pool(Load(), Load()), "m", QUEUES, waiting, is_bulk=True) == pytest.approx(2.0)
    held = Load({"m": 300.0}, 0.25)
    assert ahead_s(pool(held, held), "m", QUEUES, waiting, is_bulk=True) == pytest.approx(8.75)
    assert ahead_s(pool(held, held), "m", QUEUES, waiting, is_bulk=False) == pytest.approx(2.75)


def test_without_a_worker_one_counts_at_the_speed_last_measured() -> None:
    assert ahead_s(pool(), "m", QUEUES, [Waiting("embed", 0, 30)], is_bulk=True) == pytest.approx(3.0)


def test_half_a_batch_is_ahead_where_something_is_computed() -> None:
    assert ahead_s(pool(Load({}, 0.0, 50.0)), "m", QUEUES, [], is_bulk=False) == pytest.approx(0.25)
    # And one with it, filled up with what waits.
    assert ahead_s(pool(Load({"m": 10.0}, 0.0, 50.0)), "m", QUEUES, [], is_bulk=False) == pytest.approx(0.5)


def test_the_work_of_a_worker_s_other_models_is_ahead_as_well() -> None:
    waiting = [Waiting("embed", 0, 10), Waiting("rerank.other", 0, 20)]
    assert ahead_s(pool(Load(), models=("m",)), "m", QUEUES, waiting, is_bulk=True) == pytest.approx(1.0)
    assert ahead_s(pool(Load(), models=("m", "other")), "m", QUEUES, waiting, is_bulk=True) == pytest.approx(3.0)


def test_a_list_s_tokens_are_those_its_messages_say() -> None:
    one = pool(Load())
    assert tokens_of(one, "m", Waiting("embed", 0, 100)) == 1_000.0
    # 50 of them looked at: 40 said 2,000 characters together, 10 count as a mean job.
    assert tokens_of(one, "m", Waiting("embed", 0, 100, 50, 40, 80, 2_000)) == pytest.approx(2 * (1_000 + 100))
    # Up to the job that was looked for.
    assert tokens_of(one, "m", Waiting("embed", 0, 100, 5, 5, 80, 2_000, 1)) == pytest.approx(1_000)
    assert tokens_of(one, "m", Waiting("embed", 0, 0)) == 0.0


@given(
    st.integers(0, 10**6),
    st.integers(0, 300),
    st.integers(0, 300),
    st.integers(0, 10**9),
    st.floats(0, 10**6),
    st.booleans(),
)
def test_more_work_ahead_is_never_a_shorter_wait(
    length: int, looked_at: int, said: int, characters: int, held: float, is_bulk: bool
) -> None:
    looked_at, said = min(looked_at, length), min(said, looked_at, length)
    load = Load({"m": held}, 0.5)
    waiting = [Waiting("embed", 0, length, looked_at, said, said, characters)]
    seconds = ahead_s(pool(load), "m", QUEUES, waiting, is_bulk)
    assert seconds >= ahead_s(pool(load), "m", QUEUES, [], is_bulk) >= 0
    assert ahead_s(pool(load), "m", QUEUES, [waiting[0]._replace(characters=characters + 1)], is_bulk) >= seconds
    assert ahead_s(pool(load, load), "m", QUEUES, [], is_bulk) == pytest.approx(held * (1.0 if is_bulk else 0.5) / 100)


@pytest.mark.parametrize(
    ("info", "left_s"),
    [
        ({"started": 990.0, "done": 25, "total": 100}, 30.0),
        ({"started": 990.0, "done": 100, "total": 100}, 0.0),
        ({"started": 2_000.0, "done": 25, "total": 100}, 0.0),
        ({"started": 990.0, "done": 0, "total": 100}, None),
        ({"started": 990.0, "done": 200, "total": 100}, None),
        ({"started": "990", "done": 25, "total": 100}, None),
        ({}, None),
    ],
)
def test_a_running_job_goes_on_as_it_went(info: dict[str, Any], left_s: float | None) -> None:
    assert left_of(info, 1_000.0) == left_s


@pytest.fixture
def known(own: OwnServer, producer: Celery) -> Celery:
    """A producer on a server that knows a model and one worker of it."""
    own.client.hset("embedq:models", mapping={alias: json.dumps(asdict(model)) for alias, model in MODELS.items()})
    Speeds(own.client).publish("a worker", {"m": SPEED}, Load({"m": 100.0}, 0.0, 0.0))
    producer.conf.broker_transport_options = tasks.config.broker_transport_options
    return producer


def estimate(app: Celery, num_texts: int, **options: Any) -> float | None:
    call = {"kind": "embed", "model": None, "priority": 0, "num_characters": None} | options
    return steps.run(app, estimating.estimate(app, num_texts, **call), "")


def eta(app: Celery, job_id: str, priority: int | None = None) -> float | None:
    return steps.run(app, estimating.eta(app, job_id, priority), "")


def send(app: Celery, *ids: str, priority: int = 0) -> None:
    for job_id in ids:
        options = {"task_id": job_id, "priority": priority, "argsrepr": "4 texts, 1,000 characters", "kwargsrepr": "{}"}
        app.send_task("tasks.embed", ([],), queue="embed", **options)


def test_a_job_s_own_texts_and_the_work_ahead_of_it_count(known: Celery) -> None:
    assert estimate(known, 50) == pytest.approx(1.03)
    assert estimate(known, 50, model="m") == pytest.approx(1.03)
    assert estimate(known, 50, num_characters=1_000) == pytest.approx(5.03)
    assert estimate(known, 50, priority=9) == pytest.approx(2.03)
    assert estimate(known, 1_001) == pytest.approx(20.02 + 1.03)  # bulk by its size
    send(known, "one", "two")
    send(known, "three", priority=9)
    assert estimate(known, 50) == pytest.approx(11.03)
    assert estimate(known, 50, priority=9) == pytest.approx(18.28)


def test_many_messages_are_estimated_by_some(known: Celery, own: OwnServer) -> None:
    send(known, "one")
    (raw,) = own.client.lrange("embed", 0, -1)
    own.client.lpush("embed", *[raw] * 2_000)
    assert estimate(known, 0) == pytest.approx(2_001 * 5 + 0.03, rel=0.01)


def test_a_waiting_job_s_place_counts(known: Celery) -> None:
    send(known, "one", "two", "three")
    send(known, "bulk", priority=9)
    found = [eta(known, job_id) for job_id in ("one", "two", "three", "bulk")]
    assert found == [pytest.approx(5.03), pytest.approx(10.03), pytest.approx(15.03), pytest.approx(22.28)]


def test_a_job_is_told_by_what_stands_at_its_key(known: Celery, app: Celery) -> None:
    now_s = time.time()
    info = {"hostname": "a worker", "pid": 1, "started": now_s - 10, "done": 10, "total": 40}
    app.backend.store_result("runs", info, "STARTED")
    assert eta(known, "runs") == pytest.approx(30, abs=2)
    app.backend.store_result("of a dead worker", info | {"hostname": "gone"}, "STARTED")
    assert eta(known, "of a dead worker") == pytest.approx(1.03)  # among what the workers hold
    assert eta(known, "of a dead worker", priority=9) == pytest.approx(1.03)
    assert eta(known, "of a dead worker", priority=0) == pytest.approx(0.03)
    app.backend.store_result("done", None, "SUCCESS")
    assert eta(known, "done") == 0.0


def test_nothing_is_estimated_before_something_is_measured(producer: Celery, own: OwnServer) -> None:
    producer.conf.broker_transport_options = tasks.config.broker_transport_options
    assert estimate(producer, 5) is None
    assert eta(producer, "x") is None
    own.client.hset("embedq:models", "m", json.dumps(asdict(MODELS["m"])))
    assert estimate(producer, 5) is None
    assert eta(producer, "x") is None


def test_who_may_not_read_the_lists_gets_an_estimate_by_mean_jobs(known: Celery, own: OwnServer) -> None:
    send(known, "one", "two")
    own.client.execute_command("ACL", "SETUSER", "default", "-eval")
    try:
        assert estimate(known, 50) == pytest.approx(1.23)
    finally:
        own.client.execute_command("ACL", "SETUSER", "default", "+@all")


def test_a_server_that_refuses_is_an_error(known: Celery, own: OwnServer) -> None:
    own.client.execute_command("ACL", "SETUSER", "default", "-hgetall")
    try:
        with pytest.raises(ServerUnavailable, match="not now, the server"):
            steps.run(known, estimating.estimate(known, 1, "embed", None, 0, None), "not now")
    finally:
        own.client.execute_command("ACL", "SETUSER", "default", "+@all")


@pytest.mark.parametrize(
    "wrong",
    [{"num_texts": -1}, {"num_texts": 1.5}, {"num_texts": 1, "priority": 10}, {"num_texts": 1, "num_characters": "7"}],
)
def test_wrong_arguments_are_named(wrong: dict[str, Any], server: str) -> None:
    with pytest.raises(InvalidInput, match=[*wrong][-1]):
        tasks.estimate(**wrong)


@pytest.fixture(scope="module")
def events(worker: dict[str, str]) -> Iterator[Events]:
    with Events() as events:
        yield events


@pytest.mark.timing
def test_a_real_worker_s_jobs_end_about_when_they_were_said_to(events: Events) -> None:
    """The short form of `python -m tests.bench estimates`, which tells by how much they are wrong: here by less than thrice."""
    num_texts = bulk.num_texts_of(1.5)  # which is work that it measures itself by
    deadline_s = time.monotonic() + TIMEOUT_S
    speeds = Speeds(tasks.app.backend.client, tasks.key_prefix(tasks.app))
    while not any(speed.tokens_per_text for speed in speeds.latest().values()):
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    texts = bulk.texts(num_texts, seed=21)
    background = [bulk.send(num, seed=num) for num in (2 * num_texts, 3, num_texts)]
    time.sleep(1.5)  # the worker says what it holds
    said_s = tasks.estimate(len(texts), priority=9, num_characters=sum(map(len, texts)))
    started_s = time.monotonic()
    job = tasks.embed.apply_async((texts,), priority=9)
    left_s = asyncio.run(tasks.aeta(job))
    job.get(timeout=TIMEOUT_S)
    took_s = time.monotonic() - started_s
    for said in (said_s, left_s):
        assert said is not None
        assert took_s / 3 - 0.5 < said < took_s * 3 + 0.5
    for one in background:
        one.get(timeout=TIMEOUT_S)
    with suppress(redis.RedisError):
        assert tasks.eta(job) == 0.0
