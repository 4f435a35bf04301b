"""Threads that jobs need: one that ends unexpectedly is restarted or ends the worker, and never does so in silence."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery

from embedq.core.engine import Engine
from embedq.core.errors import DeviceFailure
from embedq.core.guarded_thread import GuardedThread, num_ends
from embedq.workers.context import Lifecycle
from embedq.workers.jobs.answer_thread import AnswersThread
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.jobs.pool import EnginePool, pool_for
from embedq.workers.monitoring.health import Health
from embedq.workers.monitoring.heartbeat import Heart
from embedq.workers.monitoring.metrics_server import WorkerCollector
from tests.checkpoints import PATIENCE_S
from tests.consuming import context


class Ending:
    """Work that raises so many times, then ends as it should."""

    def __init__(self, num_times: int, error: BaseException | None = None) -> None:
        self.left, self.error = num_times, error or RuntimeError("a text")

    def __call__(self) -> None:
        if self.left > 0:
            self.left -= 1
            raise self.error


def run(thread: GuardedThread) -> GuardedThread:
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    return thread


@pytest.mark.parametrize("error", [RuntimeError("a text"), SystemExit(1), KeyboardInterrupt()])
def test_an_unexpected_end_is_reported_counted_and_said_without_its_words(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    reasons: list[str] = []
    before = num_ends["guarded"]
    thread = run(GuardedThread("guarded", Ending(1, error), reasons.append))
    assert thread.is_broken
    assert reasons == [f"the thread guarded ended unexpectedly with {type(error).__name__}"]
    assert num_ends["guarded"] == before + 1
    (record,) = caplog.records
    assert (record.levelno, vars(record)["action"]) == (logging.CRITICAL, "thread_broken")
    assert "test_guarded_thread.py" in record.getMessage()
    assert "a text" not in caplog.text


def test_a_thread_that_may_be_restarted_is_until_it_ends_too_often(caplog: pytest.LogCaptureFixture) -> None:
    reasons: list[str] = []
    assert not run(GuardedThread("restarted", Ending(2), reasons.append, max_restarts=2)).is_broken
    assert [vars(record)["action"] for record in caplog.records] == ["thread_restarted"] * 2
    assert reasons == []
    assert run(GuardedThread("restarted", Ending(3), reasons.append, max_restarts=2)).is_broken
    assert len(reasons) == 1
    assert not run(GuardedThread("restarted", Ending(5), max_restarts=None)).is_broken


def test_a_thread_that_ends_as_it_should_is_neither(caplog: pytest.LogCaptureFixture) -> None:
    assert not run(GuardedThread("ending", lambda: None, pytest.fail)).is_broken
    assert not caplog.records


def test_unexpected_ends_are_a_metric_of_the_worker_from_zero(engine: Engine) -> None:
    lifecycle = Lifecycle()
    health = Health(lifecycle)
    health.serves("worker", HeldJobs(engine))

    def counted() -> dict[str, float]:
        families = WorkerCollector(health, Heart(lifecycle, None)).collect()
        (family,) = [one for one in families if one.name == "embedq_thread_ends"]
        return {sample.labels["thread"]: sample.value for sample in family.samples}

    before = counted()
    assert {"completion", "encode-0", "watchdog"} <= before.keys()
    thread = GuardedThread("measured", Ending(2), max_restarts=None)
    assert counted()["measured"] == before.get("measured", 0)
    run(thread)
    assert counted() == before | {"measured": before.get("measured", 0) + 2}


def test_an_encode_thread_that_fails_fails_its_jobs_and_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = engine.encoding._add

    def fails_once(parts: Any) -> None:
        monkeypatch.setattr(engine.encoding, "_add", add)
        raise SystemError("a bug")

    monkeypatch.setattr(engine.encoding, "_add", fails_once)
    job = engine.submit(lambda: engine.calls.embed(["lost"]))
    assert isinstance(job.answer.exception(PATIENCE_S), DeviceFailure)
    assert engine.embed(["a text"]).dense is not None
    assert engine.is_alive


def test_an_encode_thread_that_fails_again_and_again_gives_the_engine_up(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_dead = threading.Event()
    engine.on_dead = lambda reason: is_dead.set()

    def fails(parts: Any) -> None:
        raise SystemError("a bug")

    monkeypatch.setattr(engine.encoding, "_add", fails)
    while not is_dead.is_set():
        try:
            engine.submit(lambda: engine.calls.embed(["lost"])).answer.exception(PATIENCE_S)
        except DeviceFailure:
            break
    assert is_dead.wait(PATIENCE_S)
    assert not engine.is_alive
    with pytest.raises(DeviceFailure, match=r"encode-\d ended unexpectedly"):
        engine.embed(["a text"])


def test_a_completion_thread_that_ends_gives_the_engine_up_and_no_job_waits_for_ever(engine: Engine) -> None:
    reasons: list[str] = []
    engine.on_dead = reasons.append

    def end(_: object) -> None:
        raise SystemExit  # of an application's callback, say

    engine._completion.submit(lambda: end(None))
    engine._completion._thread.join(PATIENCE_S)
    with pytest.raises(DeviceFailure):
        engine.embed(["a text"])
    assert not engine.is_alive
    assert reasons == ["the thread completion ended unexpectedly with SystemExit"]


@contextmanager
def broken_batch() -> Iterator[None]:
    yield
    raise RuntimeError("of the results' server, unlike any we know")


def test_an_answers_thread_that_ends_ends_the_worker() -> None:
    reasons, is_told = [], threading.Event()
    answers = AnswersThread(broken_batch, lambda reason: (reasons.append(reason), is_told.set())[0])
    answers.submit(lambda: None)
    assert is_told.wait(PATIENCE_S)
    assert reasons == ["the thread answers ended unexpectedly with RuntimeError"]
    assert not answers.is_alive


def test_a_worker_whose_answers_thread_ended_is_not_live_and_renews_no_lease(app: Celery, engine: Engine) -> None:
    ended: list[str] = []
    held, health = HeldJobs(engine), Health(Lifecycle())
    pool: EnginePool = pool_for(context(end=ended.append), held)(limit=1, app=app)
    pool.on_start()
    health.serves("worker", held)
    assert (held.is_alive, health.live()[0]) == (True, True)

    def end() -> None:
        raise SystemExit

    pool._answers.submit(end)
    pool._answers._thread.join(PATIENCE_S)
    assert ended == ["the thread answers ended unexpectedly with SystemExit"]
    assert held.is_alive is False
    assert health.live() == (False, "a thread that jobs need ended unexpectedly")
    pool.on_stop()


def test_a_part_thread_that_is_not_restarted_any_more_ends_the_worker(app: Celery, engine: Engine) -> None:
    ended: list[str] = []
    held = HeldJobs(engine)
    pool: EnginePool = pool_for(context(end=ended.append), held)(limit=1, app=app)
    pool.on_start()
    assert held.parts.on_broken is not None
    held.parts.on_broken("a reason")
    assert ended == ["a reason"]
    pool.on_stop()
