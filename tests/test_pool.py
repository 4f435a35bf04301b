"""The pool's promises, without a worker process: what it reports to Celery, in which order, and which jobs it holds."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from celery.worker import state

from embedq.core.engine import Engine
from embedq.core.errors import InvalidInput, ServerUnavailable
from embedq.workers.context import DRAINING
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.jobs.pool import EnginePool, pool_for
from embedq.workers.jobs.request import EngineRequest
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.consuming import context
from tests.engines import running
from tests.loops import wait_for_waiting
from tests.own_server import OwnServer
from tests.pooled_jobs import Noted, answer_of, apply, request_of


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
    task = SimpleNamespace(
        name="tasks.embed",
        open_call=lambda engine, args, kwargs: engine.calls.embed(["a text"]),
        fingerprint=lambda args, kwargs: "",
    )

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
            lambda *_: (True, None, 0.0), (None, None, {}, ((), {}, {})), {}, **request.options, **{limit: 0.05}
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


@contextmanager
def held_in_a_pass(pool: EnginePool, model: FakeModel, **limits: Any) -> Iterator[Noted]:
    """A job whose batch is under way until the block ends; Celery has seen it start."""
    model.gate.clear()
    request = request_of(["held"], "held")
    try:
        apply(pool, request, **limits)
        assert model.begun.acquire(timeout=PATIENCE_S)
        request.wait_for("accepted")
        yield request
    finally:
        model.gate.set()


def test_a_job_starts_with_its_batch_and_is_acknowledged_with_its_answer(pool: EnginePool, model: FakeModel) -> None:
    waiting = request_of(["behind it"], "waiting")
    with held_in_a_pass(pool, model) as first:
        apply(pool, waiting)
        wait_for_waiting(pool.engine.backlog, 1)
        assert waiting.__dict__.get("notes", []) == []
        assert sorted(pool.jobs.running()) == ["held", "waiting"]
    for request in (first, waiting):
        assert request.wait_for("answered") == ["accepted", "answered"]
        has_failed, result, _ = request.__dict__["outcome"]
        assert (has_failed, result.dense.shape) == (False, (1, 2))
    assert pool.jobs.wait_until_empty(PATIENCE_S)
    assert pool.jobs.counts.num_jobs == 2


def test_a_wrong_call_is_answered_with_its_error_and_never_computed(pool: EnginePool, model: FakeModel) -> None:
    request = request_of([7])  # type: ignore[list-item]
    apply(pool, request)
    assert request.wait_for("answered") == ["accepted", "answered"]
    has_failed, error, _ = request.__dict__["outcome"]
    assert has_failed
    assert isinstance(error, InvalidInput)
    assert model.batches == []


def test_a_result_is_stored_before_its_job_is_acknowledged(pool: EnginePool, app: Celery, own: OwnServer) -> None:
    request = request_of(["a"], "stored first")
    stored: list[int] = []

    def store(*arguments: Any) -> tuple[bool, Any, float]:
        outcome = answer_of(*arguments)
        app.backend.mark_as_done("stored first", outcome[1], request=None)
        stored.append(own.client.exists("celery-task-meta-stored first"))
        return outcome

    note = request.note
    request.__dict__["note"] = lambda what: (
        stored.append(own.client.exists("celery-task-meta-stored first")),
        note(what),
    )
    apply(pool, request, store)
    request.wait_for("answered")
    # "accepted", then within the tracer, where it waits for the others of its round, and at last "answered".
    assert stored == [0, 0, 1]


def test_a_job_whose_result_cannot_be_stored_is_given_back(
    pool: EnginePool, app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def unavailable() -> Iterator[None]:
        yield
        raise ServerUnavailable("the server is away")

    monkeypatch.setattr(type(app.backend), "batch", lambda self: unavailable())
    request = request_of(["a"])
    state.task_reserved(request)
    apply(pool, request)
    assert request.wait_for("given back") == ["accepted", "given back"]
    assert pool.jobs.wait_until_empty(PATIENCE_S)
    assert request.id not in state.requests, "it takes the room of another job for ever"


def test_a_message_that_breaks_the_tracer_fails_alone(pool: EnginePool) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("chord")

    bad, good = request_of(["a"], "bad"), request_of(["b"], "good")
    apply(pool, bad, broken)
    apply(pool, good)
    assert bad.wait_for("failed") == ["accepted", "failed"]
    assert good.wait_for("answered") == ["accepted", "answered"]
    assert pool.jobs.wait_until_empty(PATIENCE_S)


def test_a_job_that_a_closed_engine_refuses_is_left_to_its_queue(pool: EnginePool, engine: Engine) -> None:
    engine.close()
    request = request_of(["a"])
    apply(pool, request)
    assert (len(pool.jobs), request.__dict__.get("notes", [])) == (0, [])


def test_a_revoked_job_leaves_while_it_waits_and_not_once_it_runs(pool: EnginePool, model: FakeModel) -> None:
    waiting, staying = request_of(["waits"], "waiting"), request_of(["stays"], "staying")
    with held_in_a_pass(pool, model) as first:
        apply(pool, waiting)
        apply(pool, staying)
        wait_for_waiting(pool.engine.backlog, 2)
        first.__dict__["is_unwanted"] = waiting.__dict__["is_unwanted"] = True
        pool.drop_revoked()
        assert waiting.wait_for("revoked") == ["revoked"]
        wait_for_waiting(pool.engine.backlog, 1)
        assert sorted(pool.jobs.running()) == ["held", "staying"]
    assert first.wait_for("answered") == ["accepted", "answered"]
    staying.wait_for("answered")
    assert waiting.notes == ["revoked"]


def test_an_expired_job_is_dropped_at_its_time(pool: EnginePool, model: FakeModel) -> None:
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=0.1)
    request = request_of(["waits"], "expiring", expires=soon.isoformat())
    request.__dict__["is_unwanted"] = True
    with held_in_a_pass(pool, model):
        apply(pool, request)
        assert request.wait_for("revoked") == ["revoked"]
        assert pool.jobs.running() == ["held"]


def test_a_job_beyond_its_soft_limit_is_answered_with_that_error(pool: EnginePool, model: FakeModel) -> None:
    with held_in_a_pass(pool, model, soft_timeout=0.05) as request:
        assert request.wait_for("answered") == ["accepted", "soft limit", "answered"]
        has_failed, error, _ = request.__dict__["outcome"]
        assert has_failed
        assert isinstance(error, SoftTimeLimitExceeded)
        assert pool.jobs.wait_until_empty(PATIENCE_S)


def test_a_job_beyond_its_limit_is_left_to_celery_and_its_answer_dropped(pool: EnginePool, model: FakeModel) -> None:
    with held_in_a_pass(pool, model, timeout=0.05) as request:
        request.wait_for("limit")
        assert pool.jobs.wait_until_empty(PATIENCE_S)
    after = request_of(["after it"], "after")
    apply(pool, after)
    after.wait_for("answered")  # behind it, on the one thread that answers
    assert request.notes == ["accepted", "limit"]
    assert pool.jobs.job_counts.outcomes["fake", "embed", "failed"] == 1


def test_a_job_beyond_its_limit_whose_failure_cannot_be_stored_is_given_back(
    pool: EnginePool, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*_: Any) -> None:
        raise ServerUnavailable("the server is away")

    monkeypatch.setattr(Noted, "on_timeout", unavailable)
    with held_in_a_pass(pool, model, timeout=0.05) as request:
        assert request.wait_for("given back") == ["accepted", "given back"]
        assert pool.jobs.wait_until_empty(PATIENCE_S)


def test_limits_begin_with_the_first_batch_and_end_with_the_answer(pool: EnginePool, model: FakeModel) -> None:
    request = request_of(["waits"], "waiting")
    with held_in_a_pass(pool, model, soft_timeout=3600, timeout=7200) as first:
        held = apply(pool, request, soft_timeout=3600, timeout=7200)
        wait_for_waiting(pool.engine.backlog, 1)
        assert held.timers == []
        (limited,) = (one for one in pool.jobs.all() if one is not held)
        timers = limited.timers
        assert [timer.action is not None for timer in timers] == [True, True]
    request.wait_for("answered")
    first.wait_for("answered")
    assert pool.jobs.wait_until_empty(PATIENCE_S)
    assert [timer.action for timer in timers] == [None, None], "an answered job stayed until its limits"


def test_draining_ends_running_jobs_and_leaves_waiting_ones_to_their_queue(pool: EnginePool, model: FakeModel) -> None:
    waiting = request_of(["waits"], "waiting")
    with ThreadPoolExecutor(1) as celery:
        with held_in_a_pass(pool, model) as first:
            apply(pool, waiting)
            wait_for_waiting(pool.engine.backlog, 1)
            pool.on_close()
            stopped = celery.submit(pool.on_stop)
            wait_for_waiting(pool.engine.backlog, 0)
            assert not stopped.done()
        stopped.result(PATIENCE_S)
    assert first.notes == ["accepted", "answered"]
    assert waiting.__dict__.get("notes", []) == []
    pool.on_start()  # for the fixture, which stops it


@pytest.mark.parametrize("how", ["on_stop", "on_terminate"])
def test_draining_is_bounded_and_late_jobs_are_left_to_their_queue(app: Celery, model: FakeModel, how: str) -> None:
    with running(model, drain_timeout_s=0.1) as engine:
        pool = pool_for(context(), HeldJobs(engine))(limit=1, app=app)
        pool.on_start()
        with held_in_a_pass(pool, model) as request:
            with ThreadPoolExecutor(1) as celery:
                celery.submit(getattr(pool, how)).result(PATIENCE_S)
            # Not held: the channel gives it back as it closes. Its rows are dropped when they come.
            assert (len(pool.jobs), pool.jobs.running()) == (0, [])
        assert request.notes == ["accepted"]


@pytest.mark.parametrize("method", ["grow", "shrink"])
def test_the_pool_has_no_size_to_change(pool: EnginePool, method: str) -> None:
    with pytest.raises(NotImplementedError, match="no size"):
        getattr(pool, method)()
