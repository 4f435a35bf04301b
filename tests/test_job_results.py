"""Waiting for our jobs inside an application's tasks: what may be waited for, what is refused and by whom."""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from celery import Celery, chain, chord, group
from celery.result import ResultSet, denied_join_result

from embedq import tasks
from embedq.core.codec import pack
from embedq.core.engine import Engine
from embedq.core.errors import WouldBlock
from embedq.tasks.job_results import JobGroupResult, JobResult
from tests.chaos.light_worker import ALIAS
from tests.own_server import OwnServer
from tests.running import Running
from tests.traced_jobs import CALLS, make_app, run

TIMEOUT_S = 60

OURS = {"exchange": "", "routing_key": f"embed.{ALIAS}", "priority": 0, "redelivered": False}


@pytest.fixture
def sent(own: OwnServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Celery]:
    """Our application on an empty server where no worker runs."""
    own.client.flushall()
    before = {name: tasks.app.conf[name] for name in ("broker_url", "result_backend")}
    tasks.app.conf.update(broker_url=own.url, result_backend=own.url)
    tasks.app.drop_connections()
    monkeypatch.setattr(tasks.EngineTask, "check_model", lambda *_: None)
    yield tasks.app
    tasks.app.conf.update(before)
    tasks.app.drop_connections()


@pytest.fixture
def theirs(own: OwnServer) -> Iterator[Celery]:
    """An application with a worker of its own on the same server."""
    app = Celery("theirs", broker=own.url, backend=own.url, set_as_current=False)
    app.conf.task_default_queue = "theirs"

    @app.task(name="prepare", shared=False)
    def prepare(text: str) -> list[str]:
        return list(text)

    @app.task(name="store", shared=False)
    def store(vectors: Any) -> int:
        return len(vectors)

    yield app
    app.close()


def answer(*jobs: Any) -> None:
    """Store the results of jobs, where a worker does."""
    embeddings = tasks.Embeddings(dense=np.ones((1, 2), np.float32))
    for job in jobs:
        meta = {"status": "SUCCESS", "result": embeddings, "task_id": job.id, "traceback": None, "children": []}
        tasks.app.backend.client.set(tasks.app.backend.get_key_for_task(job.id), pack(meta))


def single(app: Celery, theirs: Celery) -> Any:
    job = tasks.embed.delay(["a"])
    answer(job)
    return job


def under_an_id_of_mine(app: Celery, theirs: Celery) -> Any:
    job = tasks.embed.apply_async((["a"],), task_id="mine")
    answer(job)
    return job


def by_id(app: Celery, theirs: Celery) -> Any:
    return app.AsyncResult(single(app, theirs).id)


def of_a_group(app: Celery, theirs: Celery) -> Any:
    jobs = group(tasks.embed.s([word]) for word in "ab")()
    answer(*jobs.results)
    return jobs


def of_a_set(app: Celery, theirs: Celery) -> Any:
    return app.ResultSet([single(app, theirs), single(app, theirs)])


def of_a_chain(app: Celery, theirs: Celery) -> Any:
    job = chain(tasks.embed.si(["a"]), tasks.embed.si(["b"]))()
    answer(job.parent, job)
    return job


def of_a_chord(app: Celery, theirs: Celery) -> Any:
    job = chord([tasks.embed.si(["a"]), tasks.embed.si(["b"])], tasks.embed.si(["c"]))()
    answer(*job.parent.results, job)
    return job


def of_embed_many(app: Celery, theirs: Celery) -> Any:
    jobs = tasks.embed_many([["a"], ["b"]])
    answer(*jobs)
    return jobs[1]


MAY_BE_WAITED_FOR = [
    single, under_an_id_of_mine, by_id, of_a_group, of_a_set, of_a_chain, of_a_chord, of_embed_many,
]  # fmt: skip


def behind_a_task_of_theirs(app: Celery, theirs: Celery) -> Any:
    return chain(theirs.tasks["prepare"].s("ab"), tasks.embed.s())()


def before_a_task_of_theirs(app: Celery, theirs: Celery) -> Any:
    return chain(tasks.embed.s(["a"]), theirs.tasks["store"].s())()


def behind_a_group_with_a_task_of_theirs(app: Celery, theirs: Celery) -> Any:
    return chord([tasks.embed.s(["a"]), theirs.tasks["prepare"].s("ab")], tasks.embed.si(["c"]))()


def of_a_group_with_a_task_of_theirs(app: Celery, theirs: Celery) -> Any:
    return group([tasks.embed.s(["a"]), theirs.tasks["prepare"].s("ab")])()


CELERY_REFUSES = [
    behind_a_task_of_theirs, before_a_task_of_theirs, behind_a_group_with_a_task_of_theirs, of_a_group_with_a_task_of_theirs,
]  # fmt: skip


@pytest.mark.parametrize("make", MAY_BE_WAITED_FOR)
def test_results_of_our_jobs_may_be_waited_for_inside_a_task(
    make: Callable[..., Any], sent: Celery, theirs: Celery
) -> None:
    with denied_join_result():
        job = make(sent, theirs)
        got = job.get(timeout=TIMEOUT_S)
    assert {one.dense.shape for one in (got if isinstance(got, list) else [got])} == {(1, 2)}


@pytest.mark.parametrize("make", CELERY_REFUSES)
def test_what_needs_a_task_of_the_application_is_left_to_celery(
    make: Callable[..., Any], sent: Celery, theirs: Celery
) -> None:
    job = make(sent, theirs)
    with denied_join_result(), pytest.raises(RuntimeError, match=r"Never call result\.get\(\) within a task"):
        job.get(timeout=TIMEOUT_S)


def test_a_group_may_be_joined_either_way(sent: Celery, theirs: Celery) -> None:
    with denied_join_result():
        jobs = of_a_group(sent, theirs)
        assert [len(jobs.join(timeout=TIMEOUT_S)), len(jobs.join_native(timeout=TIMEOUT_S))] == [2, 2]
        assert single(sent, theirs).wait(timeout=TIMEOUT_S).dense.shape == (1, 2)


@pytest.mark.parametrize("make", [single, under_an_id_of_mine, of_a_group, of_a_set, of_a_chain])
def test_a_task_that_came_from_our_queue_may_not_wait(make: Callable[..., Any], sent: Celery, theirs: Celery) -> None:
    """Run as a worker runs it, by Celery's own tracer."""
    raised: list[str] = []

    def wait() -> None:
        with pytest.raises(WouldBlock) as caught:
            make(sent, theirs).get(timeout=TIMEOUT_S)
        raised.append(str(caught.value))

    CALLS[:] = [wait]
    app = make_app(sent.conf.broker_url)
    run(app, "call", 0, delivery_info=OURS)
    assert len(raised) == 1
    assert raised[0].startswith(f"the task 'call' came from embedq's queue 'embed.{ALIAS}' and may not wait for a job")
    app.close()


def test_nor_await(sent: Celery, theirs: Celery) -> None:
    raised: list[Any] = []

    def wait() -> None:
        with pytest.raises(WouldBlock):
            asyncio.run(tasks.aget(single(sent, theirs), timeout=TIMEOUT_S))
        raised.append(True)

    CALLS[:] = [wait]
    app = make_app(sent.conf.broker_url)
    run(app, "call", 0, delivery_info=OURS)
    assert raised
    app.close()


@pytest.mark.parametrize(
    ("queue", "database"), [("theirs", 0), ("embedding", 0), (f"embed.{ALIAS}", 7)], ids=["own", "alike", "elsewhere"]
)
def test_a_task_from_a_queue_of_the_application_may_wait_and_await(
    queue: str, database: int, sent: Celery, theirs: Celery
) -> None:
    got: list[Any] = []

    def wait() -> None:
        got.append(single(sent, theirs).get(timeout=TIMEOUT_S))
        got.append(asyncio.run(tasks.aget(single(sent, theirs), timeout=TIMEOUT_S)))

    CALLS[:] = [wait]
    app = make_app(sent.conf.broker_url[:-1] + str(database))
    run(app, "call", 0, delivery_info=OURS | {"routing_key": queue})
    assert len(got) == 2
    app.close()


def test_results_are_pickled_and_made_from_tuples_as_celerys(sent: Celery, theirs: Celery) -> None:
    job, jobs = single(sent, theirs), of_a_group(sent, theirs)
    assert isinstance(job, JobResult)
    assert isinstance(jobs, JobGroupResult)
    assert pickle.loads(pickle.dumps(job)) == job
    assert pickle.loads(pickle.dumps(jobs)) == jobs


def test_jobs_computed_where_they_are_sent_are_there_at_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.EngineTask, "engine", engine)
    monkeypatch.setitem(tasks.app.conf, "task_always_eager", True)
    with denied_join_result():
        assert len(tasks.embed.delay(["a"]).get()) == 1
        assert [len(one) for one in group(tasks.embed.s([word]) for word in "ab")().get()] == [1, 1]
        assert len(asyncio.run(tasks.aget(tasks.embed.delay(["a"])))) == 1
        with pytest.raises(RuntimeError, match="Never call"):
            ResultSet([tasks.embed.delay(["a"])]).get()  # Celery's own


_WAITING_WORKER = f"""
from embedq import tasks
from tests.chaos import light_worker

@tasks.app.task(name="mine.waits", shared=False)
def waits():
    return len(tasks.embed.delay(["a"], model={ALIAS!r}).get(timeout={TIMEOUT_S}))

light_worker.main(1)
"""


def test_a_worker_of_ours_refuses_the_wait_of_a_task_that_it_runs(sent: Celery, tmp_path: Path) -> None:
    environment = {
        "EMBEDQ_REDIS_URL": sent.conf.broker_url,
        "EMBEDQ_MODELS": f"{ALIAS}=/",
        "CHAOS_NOTES": str(tmp_path),
    }
    with Running([sys.executable, "-c", _WAITING_WORKER], environment) as running:
        running.wait_for("action=worker_ready")
        with pytest.raises(WouldBlock, match=r"the task 'mine\.waits' came from embedq's queue 'embed'"):
            sent.send_task("mine.waits", queue="embed").get(timeout=TIMEOUT_S)
        assert len(tasks.embed.delay(["a"], model=ALIAS).get(timeout=TIMEOUT_S)) == 1
