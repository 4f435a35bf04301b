"""Whether a hung engine is told from an idle one and from a busy one; behind the seam, with a model that waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client import CollectorRegistry

from embedq.core.engine import Engine
from embedq.core.errors import DeviceFailure
from embedq.tasks.scraping import Scraping
from embedq.workers.context import DRAINING, LOADING, READY, WAITING, Lifecycle
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.monitoring.health import Health, readiness_for
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.consuming import context
from tests.engines import busy, running
from tests.scraping import get, wait_until

#: Seconds that count as hung here.
LIMIT_S = 0.3


def serving(health: Health, engine: Engine, num_held: int = 0) -> None:
    """Let `health` look at an engine and so many held jobs."""
    held = HeldJobs(engine)
    for _ in range(num_held):
        held.add(object())  # type: ignore[arg-type]
    health.serves("worker", held)


@contextmanager
def pages(health: Health) -> Iterator[str]:
    with Scraping("127.0.0.1", 0, CollectorRegistry(), {"/live": health.live, "/ready": health.ready}) as served:
        yield f"http://127.0.0.1:{served.port}"


def test_a_pass_that_hangs_is_told_and_an_idle_engine_is_well(model: FakeModel) -> None:
    health = Health(Lifecycle())
    with running(model, hang_timeout_s=LIMIT_S) as engine, pages(health) as address:
        assert get(f"{address}/live") == (200, f"{LOADING}\n")
        serving(health, engine)
        assert get(f"{address}/live")[0] == 200
        model.gate.clear()
        job = engine.submit(lambda: engine.calls.embed(["a text"]))
        wait_until(lambda: get(f"{address}/live") == (503, "a forward pass hangs, or the device was given up\n"))
        assert isinstance(job.answer.exception(PATIENCE_S), DeviceFailure)  # and then it stays so
        assert get(f"{address}/live")[0] == 503


def test_held_jobs_of_which_nothing_gets_on_are_told_though_no_pass_runs(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    health, is_open = Health(Lifecycle()), threading.Event()
    encode = model.encode_texts
    monkeypatch.setattr(model, "encode_texts", lambda *given: (is_open.wait(PATIENCE_S), encode(*given))[1])
    with running(model, hang_timeout_s=LIMIT_S) as engine, pages(health) as address:
        serving(health, engine, num_held=1)
        health.lifecycle.state = READY
        job = engine.submit(lambda: engine.calls.embed(["a text"]))
        assert get(f"{address}/live")[0] == 200
        wait_until(lambda: get(f"{address}/live")[0] == 503)
        assert "1 jobs are held and none of them has made progress for" in get(f"{address}/live")[1]
        is_open.set()
        job.answer.result(PATIENCE_S)
        assert get(f"{address}/live")[0] == 200  # a batch has ended meanwhile


def test_what_waits_for_the_server_is_no_standstill(engine: Engine) -> None:
    health = Health(Lifecycle())
    serving(health, engine, num_held=1)
    health.lifecycle.state = WAITING
    long_s = 2 * engine.settings.hang_timeout_s
    assert health.live() == (True, WAITING)
    health._seen_s -= long_s
    assert health.live() == (True, WAITING)
    health.lifecycle.state = READY
    assert health.live() == (True, READY)
    health._seen_s -= long_s
    assert not health.live()[0]


def test_a_busy_engine_lives(engine: Engine, model: FakeModel) -> None:
    health = Health(Lifecycle())
    serving(health, engine, num_held=1)
    with busy(engine, model):
        assert health.live()[0]


def test_ready_follows_the_consumer_until_it_drains() -> None:
    worker = context()
    health = Health(worker.lifecycle)
    step = readiness_for(worker)(None)
    assert health.ready() == (False, LOADING)
    step.start(None)
    assert health.ready() == (True, READY)
    step.stop(None)
    assert health.ready() == (False, WAITING)
    step.start(None)
    health.lifecycle.state = DRAINING
    step.stop(None)
    assert health.ready() == (False, DRAINING)
