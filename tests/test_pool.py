"""The pool's promises to the transport, without a worker process: which jobs it holds, and until when."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from celery import Celery

from embedq.core.engine import Engine
from embedq.workers.context import DRAINING
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.jobs.pool import EnginePool, pool_for
from embedq.workers.jobs.request import EngineRequest
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.consuming import context


@pytest.fixture
def pool(app: Celery, engine: Engine) -> Iterator[EnginePool]:
    """A pool that has started, over an engine of a fake model and a worker's real backend."""
    pool = pool_for(context(), HeldJobs(engine))(limit=1, app=app)
    pool.on_start()
    yield pool
    pool.on_stop()


class Bookkeeping:
    """What Celery keeps of a job, as far as the pool looks at it; notes what the pool holds as it is told."""

    id, task = "the job", None

    def __init__(self, pool: EnginePool) -> None:
        self.pool, self.delivery_info, self.is_told = pool, {"routing_key": "embed"}, threading.Event()
        self.held_meanwhile: list[str] = []

    def accepted(self, *_: Any) -> None:
        """The job has started."""

    def reject(self, requeue: bool = False) -> None:
        """It goes back, because its result could not be stored."""

    def done(self, _: Any) -> None:
        """It is acknowledged here."""
        self.held_meanwhile = self.pool.jobs.running()
        self.is_told.set()


def test_a_job_is_held_until_it_is_acknowledged(pool: EnginePool) -> None:
    request = Bookkeeping(pool)
    callbacks = {"accept_callback": request.accepted, "callback": request.done, "error_callback": request.done}
    pool.on_apply(lambda: (False, "result", 0.0), (), {}, **callbacks, timeout_callback=None)
    assert request.is_told.wait(PATIENCE_S)
    assert request.held_meanwhile == ["the job"]
    assert pool.jobs.wait_until_empty(PATIENCE_S)


class OfEngine(EngineRequest):
    """Celery's bookkeeping of a job of the engine's, without a message; notes which limits it exceeded."""

    id, name, num_bytes, expires = "limited", "tasks.embed", 1, None
    delivery_info: ClassVar[dict[str, Any]] = {"routing_key": "embed", "priority": 0}
    task = SimpleNamespace(name="tasks.embed", open_call=lambda engine, args, kwargs: engine.calls.embed(["a text"]))

    def __init__(self) -> None:
        self.limits: list[bool] = []
        self.is_accepted = threading.Event()
        self.is_limited = threading.Event()
        self.is_over = threading.Event()

    def accepted(self, *_: Any) -> None:
        """Its first batch begins."""
        self.is_accepted.set()

    def timed_out(self, is_soft: bool, seconds: float) -> None:
        """A limit passed."""
        self.limits.append(is_soft)
        self.is_limited.set()

    def done(self, *_: Any) -> None:
        """It is acknowledged."""
        self.is_over.set()

    @property
    def options(self) -> dict[str, Any]:
        """What Celery passes to the pool."""
        return {
            "accept_callback": self.accepted,
            "callback": self.done,
            "error_callback": self.done,
            "timeout_callback": self.timed_out,
        }


@pytest.mark.parametrize("limit", ["soft_timeout", "timeout"])
def test_a_limit_holds_for_a_job_whose_first_batch_begins_before_it_is_submitted(
    pool: EnginePool, model: FakeModel, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    request = OfEngine()
    submit = pool.engine.submit

    def slow_submit(*args: Any) -> Any:
        job = submit(*args)
        assert request.is_accepted.wait(PATIENCE_S)
        return job

    monkeypatch.setattr(pool.engine, "submit", slow_submit)
    model.gate.clear()
    try:
        pool.on_apply(
            lambda *_: (True, None, 0.0), (None, None, None, ((), {}, {})), {}, **request.options, **{limit: 0.05}
        )
        assert request.is_limited.wait(PATIENCE_S)
    finally:
        model.gate.set()
    assert request.limits == [limit == "soft_timeout"]
    assert pool.jobs.wait_until_empty(PATIENCE_S)


def test_nothing_is_fetched_before_the_pool_has_started_nor_once_it_closes(app: Celery, engine: Engine) -> None:
    held = HeldJobs(engine)
    worker = context()
    pool = pool_for(worker, held)(limit=1, app=app)
    assert held.room().max_jobs == 0
    pool.start()
    assert held.room().max_jobs > 0
    pool.close()
    assert (held.room().max_jobs, worker.lifecycle.state) == (0, DRAINING)
    pool.stop()
