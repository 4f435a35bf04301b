"""`await tasks.aget(job)` returns and raises as `job.get()` does, for thousands of jobs on one subscription."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import redis.asyncio
from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeoutError

from embedq import tasks
from embedq.core.errors import InvalidInput, ServerUnavailable
from embedq.tasks import awaiting
from tests.own_server import OwnServer
from tests.running import ROOT
from tests.test_waiting import channels, counted
from tests.traced_jobs import CALLS, run


async def until(happens: Callable[[], bool]) -> None:
    for _ in range(2000):
        if happens():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


@pytest.fixture
def warm(own: OwnServer) -> OwnServer:
    """The server, which saw these commands before: their first use counts for more."""
    own.client.mget(["x"])
    return own


def test_it_returns_what_get_returns(app: Celery, producer: Celery, own: OwnServer) -> None:
    async def produce() -> Any:
        job = producer.AsyncResult("job")
        wait = asyncio.create_task(tasks.aget(job, timeout=20))
        await until(lambda: channels(own) == [b"celery-task-meta-job"])
        run(app, "embed_one", 1.0, job_id="job")
        value = await wait
        assert job.get() is value  # read once
        return value

    assert asyncio.run(produce(), debug=True).dense[0, 0] == 1.0


def test_it_raises_what_get_raises(app: Celery, producer: Celery) -> None:
    run(app, "fail", job_id="job")
    with pytest.raises(InvalidInput, match="number 3 is int"):
        asyncio.run(tasks.aget(producer.AsyncResult("job")))
    with pytest.raises(CeleryTimeoutError):
        asyncio.run(tasks.aget(producer.AsyncResult("other"), timeout=0.1))


def test_a_job_whose_result_is_not_wanted_is_not_waited_for(producer: Celery) -> None:
    job = producer.send_task("embed_one", queue="embed", ignore_result=True)
    assert asyncio.run(tasks.aget(job, timeout=1)) is None


def test_a_group_gives_the_list_or_the_first_error(app: Celery, producer: Celery, own: OwnServer) -> None:
    jobs = [producer.AsyncResult(run(app, "embed_one", value)) for value in (1.0, 2.0)]
    values = asyncio.run(tasks.aget(producer.GroupResult("g", jobs), timeout=5))
    assert [value.dense[0, 0] for value in values] == [1.0, 2.0]

    async def produce() -> None:
        bad = [producer.AsyncResult("never"), producer.AsyncResult(run(app, "fail"))]
        with pytest.raises(InvalidInput):
            await tasks.aget(producer.GroupResult("g", bad), timeout=5)
        await until(lambda: channels(own) == [])  # the wait for the other has ended

    asyncio.run(produce())


def test_many_waits_share_one_subscription(app: Celery, producer: Celery, warm: OwnServer) -> None:
    names = [f"job-{index}" for index in range(1000)]

    async def produce() -> list[Any]:
        waits = [asyncio.create_task(tasks.aget(producer.AsyncResult(name), timeout=60)) for name in names]
        await until(lambda: len(channels(warm)) == 1000)
        assert len(warm.client.client_list(_type="pubsub")) == 1
        with app.backend.batch():
            for index, name in enumerate(names):
                run(app, "embed_one", index, job_id=name)
        values = await asyncio.gather(*waits)
        await until(lambda: channels(warm) == [])
        return values

    with counted(warm) as made:
        values = asyncio.run(produce())
    assert [value.dense[0, 0] for value in values] == list(range(1000))
    assert made["subscribe"] == 1
    assert "get" not in made
    assert made["mget"] <= 30  # of 100 keys each: before and after the subscription


def test_results_that_are_there_need_no_subscription(app: Celery, producer: Celery, warm: OwnServer) -> None:
    async def produce(names: list[str]) -> None:
        await asyncio.gather(*(tasks.aget(producer.AsyncResult(name), timeout=20) for name in names))

    names = [run(app, "embed_one") for _ in range(50)]
    with counted(warm) as made:
        asyncio.run(produce(names))
    assert made == {"mget": 1}


def test_a_result_stored_between_the_look_and_the_subscription_is_seen(
    app: Celery, producer: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe = redis.asyncio.client.PubSub.subscribe

    async def late(pubsub: Any, *keys: Any) -> None:
        run(app, "embed_one", 7.0, job_id="job")
        await subscribe(pubsub, *keys)

    monkeypatch.setattr(redis.asyncio.client.PubSub, "subscribe", late)
    assert asyncio.run(tasks.aget(producer.AsyncResult("job"), timeout=5)).dense[0, 0] == 7.0


def test_a_result_stored_while_the_connection_is_lost_is_seen(app: Celery, producer: Celery, own: OwnServer) -> None:
    blob = app.backend.encode({"status": "SUCCESS", "result": 8, "task_id": "job"})

    async def produce() -> Any:
        wait = asyncio.create_task(tasks.aget(producer.AsyncResult("job"), timeout=20))
        await until(lambda: len(channels(own)) == 1)
        with own.client.pipeline() as pipe:  # in one step: nobody hears it
            pipe.client_kill_filter(_type="pubsub")
            pipe.set("celery-task-meta-job", blob)
            pipe.execute()
        return await wait

    assert asyncio.run(produce()) == 8


def test_a_result_too_large_for_a_subscriber_is_read_from_its_key(
    app: Celery, producer: Celery, own: OwnServer
) -> None:
    CALLS.append(lambda: np.zeros(40 * 1024 * 1024, np.uint8))  # the server cuts a subscriber off at 32 MiB

    async def produce() -> Any:
        wait = asyncio.create_task(tasks.aget(producer.AsyncResult("job"), timeout=30))
        await until(lambda: len(channels(own)) == 1)
        run(app, "call", 0, job_id="job")
        return await wait

    assert asyncio.run(produce()).nbytes == 40 * 1024 * 1024


def test_a_cancelled_wait_is_unsubscribed_and_disturbs_no_other(app: Celery, producer: Celery, own: OwnServer) -> None:
    async def produce() -> Any:
        waits = [asyncio.create_task(tasks.aget(producer.AsyncResult(name), timeout=20)) for name in ("one", "two")]
        await until(lambda: len(channels(own)) == 2)
        waits[0].cancel()
        await until(lambda: channels(own) == [b"celery-task-meta-two"])
        run(app, "embed_one", 3.0, job_id="two")
        return await waits[1]

    assert asyncio.run(produce()).dense[0, 0] == 3.0


def test_two_waits_for_one_job_both_get_it(app: Celery, producer: Celery, own: OwnServer) -> None:
    async def produce() -> list[Any]:
        waits = [asyncio.create_task(tasks.aget(producer.AsyncResult("job"), timeout=20)) for _ in range(2)]
        await until(lambda: len(channels(own)) == 1)
        run(app, "embed_one", 3.0, job_id="job")
        return await asyncio.gather(*waits)

    assert [value.dense[0, 0] for value in asyncio.run(produce())] == [3.0, 3.0]


def test_a_blob_that_cannot_be_read_is_an_error_of_its_own_wait(app: Celery, producer: Celery, own: OwnServer) -> None:
    own.client.set("celery-task-meta-odd", b"\xc1")
    good = [run(app, "embed_one") for _ in range(20)]

    async def produce() -> list[Any]:
        waits = [tasks.aget(producer.AsyncResult(name), timeout=5) for name in ("odd", *good)]
        return await asyncio.gather(*waits, return_exceptions=True)

    odd, *fine = asyncio.run(produce())
    assert "no result (DecodeError)" in str(odd)
    assert [len(value) for value in fine] == [1] * 20


def test_waits_fail_when_the_server_stays_away(
    producer: Celery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(awaiting, "_MAX_OUTAGE_S", 0.5)
    monkeypatch.setitem(producer.backend.connparams, "port", 1)
    with pytest.raises(ServerUnavailable, match="could not be reached"):
        asyncio.run(tasks.aget(producer.AsyncResult("job"), timeout=20))
    assert any(getattr(record, "action", "") == "waits_interrupted" for record in caplog.records)


def test_a_silent_server_is_noticed(
    app: Celery, producer: Celery, own: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awaiting, "_QUIET_S", 0.1)
    monkeypatch.setattr(awaiting, "_ANSWER_S", 0.3)
    blob = app.backend.encode({"status": "SUCCESS", "result": 9, "task_id": "job"})

    async def produce() -> Any:
        wait = asyncio.create_task(tasks.aget(producer.AsyncResult("job"), timeout=20))
        await until(lambda: len(channels(own)) == 1)
        own.client.execute_command("CLIENT", "PAUSE", "1000", "ALL")
        own_set = redis.asyncio.Redis.from_url(own.url)
        async with own_set:
            await own_set.set("celery-task-meta-job", blob)  # answered after the pause, and published to nobody
        return await wait

    assert asyncio.run(produce()) == 9


@pytest.mark.parametrize("of", [list, tuple])
def test_a_list_or_a_tuple_of_jobs_gives_the_list_of_their_results(
    of: Any, app: Celery, producer: Celery, own: OwnServer
) -> None:
    for number in (1.0, 2.0):
        run(app, "embed_one", number, job_id=f"job-{number}")
    jobs = of(producer.AsyncResult(f"job-{number}") for number in (1.0, 2.0))
    values = asyncio.run(tasks.aget(jobs, timeout=20))
    assert [value.dense[0, 0] for value in values] == [1.0, 2.0]
    run(app, "fail", job_id="bad")
    with pytest.raises(InvalidInput, match="number 3 is int"):
        asyncio.run(tasks.aget(of([jobs[0], producer.AsyncResult("bad"), producer.AsyncResult("never")]), timeout=20))
    assert asyncio.run(tasks.aget(of([]))) == []


def test_what_is_no_job_is_refused() -> None:
    with pytest.raises(InvalidInput, match="given str"):
        asyncio.run(tasks.aget("job"))


_CLOSED_LOOPS = """
import asyncio, gc, logging
from celery.exceptions import TimeoutError
from embedq import tasks

async def wait():
    try:
        await tasks.aget(tasks.app.AsyncResult("never"), timeout=0.2)
    except TimeoutError:
        print("waited")

logging.basicConfig(level="DEBUG")
logging.getLogger("celery").setLevel("ERROR")
for _ in range(3):
    loop = asyncio.new_event_loop()
    loop.run_until_complete(wait())
    loop.close()
    gc.collect()
"""


def test_a_loop_that_is_closed_by_hand_leaves_no_noise(own: OwnServer) -> None:
    environment = {**os.environ, "EMBEDQ_REDIS_URL": own.url, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", _CLOSED_LOOPS], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert ended.stdout.split() == ["waited"] * 3
    noise = [line for line in ended.stderr.splitlines() if not line.startswith("DEBUG")]
    assert noise == []
