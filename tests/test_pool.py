"""The pool's promises to the transport, without a worker process: which jobs it holds, and until when."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from embedq.core.engine import Engine
from embedq.workers.context import DRAINING
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.jobs.pool import EnginePool, pool_for
from tests.checkpoints import PATIENCE_S
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
