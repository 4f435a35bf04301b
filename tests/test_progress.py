"""A job that runs for long says so, and how far it is; no wait ends with that, and a small job never says it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery, states
from celery.exceptions import TaskRevokedError

from embedq import tasks
from embedq.core.engine import Engine
from embedq.tasks import cancelling, steps
from embedq.workers.jobs import progress
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.jobs.pool import EnginePool, pool_for
from tests import bulk
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.consuming import context
from tests.events import TIMEOUT_S, Events
from tests.own_server import OwnServer
from tests.pooled_jobs import Noted, apply, request_of

#: The session's worker.
WORKER = f"minilm+reranker.cpu0@{socket.gethostname()}"


@pytest.fixture(scope="module")
def events(worker: dict[str, str]) -> Iterator[Events]:
    with Events() as events:
        yield events


def until(holds: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """What `holds` returns once it is true."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    return found


def test_a_large_job_says_where_it_runs_since_when_and_how_far_it_is(events: Events) -> None:
    with bulk.busy(3_000, events) as job:
        began_s = time.time()
        until(lambda: job.state == "STARTED")
        info = until(lambda: job.info["done"] > 0 and job.info)
        assert info["hostname"] == WORKER
        assert (info["total"], info["done"] <= 3_000) == (3_000, True)
        assert began_s - 5 < info["started"] <= time.time()
        more = until(lambda: job.info["done"] > info["done"] and job.info)
        assert {**more, "done": 0} == {**info, "done": 0}
        assert not job.ready()
        (seconds,) = [job.backend.client.ttl(job.backend.get_key_for_task(job.id))]
        assert 0 < seconds <= tasks.config.wire["result_expires_s"]


def test_no_wait_ends_with_a_job_s_start(events: Events) -> None:
    num_texts = bulk.num_texts_of(4.0)
    job = bulk.send(num_texts, seed=11)
    seen: list[str] = []
    came: list[Any] = []
    others = [tasks.app.AsyncResult(job.id) for _ in range(2)]
    waiting = threading.Thread(
        target=lambda: came.append(
            others[0].get(timeout=TIMEOUT_S, on_message=lambda meta: seen.append(meta["status"]))
        )
    )
    waiting.start()
    until(lambda: job.state != "PENDING")
    assert job.state == "STARTED"
    late = threading.Thread(target=lambda: came.append(others[1].get(timeout=TIMEOUT_S)))
    late.start()  # which finds the start as it subscribes
    came.append(asyncio.run(tasks.aget(job, timeout=TIMEOUT_S)))
    waiting.join(TIMEOUT_S)
    late.join(TIMEOUT_S)
    assert [len(one) for one in came] == [num_texts] * 3
    assert "STARTED" in seen


@pytest.fixture
def pool(app: Celery, engine: Engine) -> Iterator[EnginePool]:
    """A pool that has started, over an engine of a fake model and a worker's real backend."""
    pool = pool_for(context(name="a worker"), HeldJobs(engine))(limit=1, app=app)
    pool.on_start()
    yield pool
    pool.on_stop()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs are reported after a hundredth of the usual time."""
    monkeypatch.setattr(progress, "AFTER_S", 0.01)
    monkeypatch.setattr(progress, "EVERY_S", 0.01)


class Running(Noted):
    """A job without a message, of which this worker has the lease."""

    is_leased = is_reported = True


def running_of(job_id: str) -> Running:
    request = request_of(["a text", "another"], job_id)
    request.__class__ = Running
    assert isinstance(request, Running)
    return request


def meta_of(app: Celery, job_id: str) -> dict[str, Any]:
    return dict(app.backend.get_task_meta(job_id, cache=False))


def test_a_report_follows_no_answer(app: Celery, pool: EnginePool, model: FakeModel, at_once: None) -> None:
    """Whatever stands at the key, only what is no answer is replaced."""
    model.gate.clear()
    kept = {state: f"job {state}" for state in (states.SUCCESS, states.FAILURE, states.REVOKED)}
    replaced = {state: f"job {state}" for state in (states.RETRY, states.STARTED)}
    try:
        for state, job_id in (kept | replaced).items():
            result: Any = {} if state in (states.SUCCESS, states.STARTED) else ValueError("x")
            app.backend.store_result(job_id, result, state)
        for job_id in [*kept.values(), *replaced.values(), "nobody's"]:
            apply(pool, running_of(job_id))
        until(lambda: meta_of(app, "nobody's")["status"] == "STARTED")
        until(lambda: "hostname" in (meta_of(app, replaced[states.STARTED])["result"] or {}))
        assert meta_of(app, "nobody's")["result"]["total"] == 2
        assert [meta_of(app, job_id)["status"] for job_id in kept.values()] == list(kept)
        assert {meta_of(app, job_id)["status"] for job_id in replaced.values()} == {"STARTED"}
    finally:
        model.gate.set()


def test_a_small_job_writes_nothing_but_its_result(app: Celery, pool: EnginePool, own: OwnServer) -> None:
    before = own.count("set")
    for number in range(20):
        apply(pool, running_of(f"small {number}")).request.wait_for("answered")  # type: ignore[attr-defined]
    assert own.count("set") == before  # the fake tracer stores none


def test_a_job_whose_lease_is_lost_is_the_other_worker_s_to_report(
    app: Celery, pool: EnginePool, model: FakeModel, at_once: None
) -> None:
    model.gate.clear()
    try:
        lost, kept = running_of("lost"), running_of("kept")
        lost.__class__ = type("Lost", (Running,), {"is_leased": False})
        apply(pool, lost), apply(pool, kept)
        until(lambda: meta_of(app, "kept")["status"] == "STARTED")
        assert meta_of(app, "lost")["status"] == "PENDING"
    finally:
        model.gate.set()


def test_a_job_whose_sender_is_no_celery_has_nothing_at_its_key_but_its_answer(
    app: Celery, pool: EnginePool, model: FakeModel, at_once: None
) -> None:
    assert not request_of(["a text"]).is_reported
    assert request_of(["a text"], origin="gen1@host").is_reported
    model.gate.clear()
    try:
        own, celery_s = running_of("own"), running_of("celery's")
        own.__class__ = type("Own", (Running,), {"is_reported": False})
        apply(pool, own), apply(pool, celery_s)
        until(lambda: meta_of(app, "celery's")["status"] == "STARTED")
        assert meta_of(app, "own")["status"] == "PENDING"
    finally:
        model.gate.set()


def test_a_job_that_goes_back_to_its_queue_waits_again(
    app: Celery, pool: EnginePool, model: FakeModel, at_once: None
) -> None:
    model.gate.clear()
    try:
        held = apply(pool, running_of("back"))
        until(lambda: meta_of(app, "back")["status"] == "STARTED")
        held.terminate()  # as a drain does
        until(lambda: meta_of(app, "back")["status"] == "PENDING")
    finally:
        model.gate.set()


def test_a_worker_that_was_not_told_of_a_cancelled_job_finds_it_by_its_answer(
    app: Celery, pool: EnginePool, model: FakeModel, at_once: None
) -> None:
    model.gate.clear()
    told: list[list[str]] = []
    pool.jobs.on_cancelled = lambda ids: told.append(list(ids)) or {}
    try:
        apply(pool, running_of("cancelled"))
        until(lambda: meta_of(app, "cancelled")["status"] == "STARTED")
        assert steps.run(app, cancelling.cancel(app, "cancelled", 0.0), "") == {"cancelled": "running"}
        (held,) = pool.jobs.all()
        held.reported = None  # there is news
        assert until(lambda: told, PATIENCE_S)[0] == ["cancelled"]
        with pytest.raises(TaskRevokedError):
            app.AsyncResult("cancelled").get(timeout=5)
    finally:
        model.gate.set()


def test_a_server_that_is_away_keeps_no_job_from_its_end(
    app: Celery, pool: EnginePool, model: FakeModel, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise redis.ConnectionError("away")

    monkeypatch.setattr(progress.ProgressReports, "_report", fails)
    model.gate.clear()
    request = running_of("job")
    apply(pool, request)
    request.wait_for("accepted")
    time.sleep(0.05)
    model.gate.set()
    request.wait_for("answered")
