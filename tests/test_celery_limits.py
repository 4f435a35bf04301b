"""Jobs that must not run to their end: revoked, expired, beyond a time limit. Each gives its place back at once.

A bulk job keeps the real worker busy meanwhile, so that others have to wait.
"""

from __future__ import annotations

import datetime
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError, TimeLimitExceeded

from embedq import tasks
from tests import bulk
from tests.events import TIMEOUT_S, Events

#: The session's worker.
WORKER = f"minilm+reranker.cpu0@{socket.gethostname()}"

#: Computing time of the bulk job; many times what the test needs of it.
BUSY_S = 6.0

#: A batch or two, and what a busy machine adds: within this a worker is free again after a job was ended.
FREE_S = BUSY_S / 3


@pytest.fixture(scope="module")
def events(worker: dict[str, str]) -> Iterator[Events]:
    with Events() as events:
        yield events


@pytest.fixture(scope="module")
def num_texts(worker: dict[str, str]) -> int:
    """Texts of a bulk job that takes `BUSY_S`."""
    return bulk.num_texts_of(BUSY_S)


@pytest.fixture
def running(num_texts: int, events: Events) -> Iterator[Any]:
    """A bulk job that is being computed until the test ends."""
    with bulk.busy(num_texts, events) as job:
        yield job


def assert_free() -> None:
    """The worker answers a bulk job soon: nothing of those that were ended is computed before it."""
    started_s = time.monotonic()
    bulk.send(1, seed=99).get(timeout=TIMEOUT_S)
    assert time.monotonic() - started_s < FREE_S


@pytest.mark.timing
def test_a_job_that_waits_for_the_device_can_be_revoked(running: Any, events: Events) -> None:
    job, neighbour = bulk.send(20, seed=2), bulk.send(20, seed=3)
    bulk.is_taken(job, events)
    job.revoke()
    with pytest.raises(TaskRevokedError, match="revoked"):
        job.get(timeout=TIMEOUT_S)
    assert running.state == "PENDING", "the revoked job had to wait for its turn"
    assert events.wait_for("revoked", job.id)["expired"] is False
    assert events.types(job.id)[-1] == "revoked"
    assert job.state == "REVOKED"
    assert neighbour.get(timeout=TIMEOUT_S).dense.shape == (20, 384)


@pytest.mark.timing
def test_a_job_that_waits_for_the_device_can_be_terminated(running: Any, events: Events) -> None:
    job = bulk.send(20, seed=4)
    bulk.is_taken(job, events)
    job.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        job.get(timeout=TIMEOUT_S)
    assert running.state == "PENDING", "the revoked job had to wait for its turn"
    events.wait_for("revoked", job.id)
    assert events.types(job.id)[-1] == "revoked"


@pytest.mark.timing
def test_a_job_whose_rows_are_being_computed_can_be_terminated(running: Any, events: Events) -> None:
    neighbour = bulk.send(20, seed=5)
    bulk.is_taken(neighbour, events)
    running.revoke(terminate=True)
    with pytest.raises(TaskRevokedError, match="terminated"):
        running.get(timeout=TIMEOUT_S)
    assert events.wait_for("revoked", running.id)["terminated"] is True
    assert_free()
    assert events.types(running.id) == ["received", "started", "revoked"]
    # The batch both had rows in was not interrupted.
    np.testing.assert_allclose(
        neighbour.get(timeout=TIMEOUT_S).dense, bulk.send(20, seed=5).get(timeout=TIMEOUT_S).dense, atol=1e-5
    )


def test_a_job_revoked_before_a_worker_took_it_is_never_started(events: Events) -> None:
    control(tasks.app.control.cancel_consumer, "embed")
    try:
        job = tasks.embed.delay(["x"])
        job.revoke()
        with pytest.raises(TaskRevokedError):
            job.get(timeout=TIMEOUT_S)
    finally:
        control(tasks.app.control.add_consumer, "embed")
    events.wait_for("revoked", job.id)
    assert "started" not in events.types(job.id)


def test_a_job_that_has_expired_on_arrival_is_never_started(events: Events) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=1)
    job = tasks.embed.apply_async((["x"],), expires=past)
    with pytest.raises(TaskRevokedError, match="expired"):
        job.get(timeout=TIMEOUT_S)
    assert events.wait_for("revoked", job.id)["expired"] is True
    assert "started" not in events.types(job.id)


@pytest.mark.timing
def test_a_job_that_expires_while_it_waits_for_the_device_is_given_up(running: Any, events: Events) -> None:
    job, neighbour = bulk.send(20, seed=6, expires=2.0), bulk.send(20, seed=7, expires=600)
    is_taken = bulk.is_taken(job, events)
    with pytest.raises(TaskRevokedError, match="expired"):
        job.get(timeout=TIMEOUT_S)
    # In the queue nobody sees it expire before it is taken; Celery tells no earlier.
    assert not is_taken or running.state == "PENDING", "the expired job had to wait for its turn"
    assert events.wait_for("revoked", job.id)["expired"] is True
    assert neighbour.get(timeout=TIMEOUT_S).dense.shape == (20, 384)


@pytest.mark.timing
@pytest.mark.parametrize(
    ("limit", "error"),
    [({"soft_time_limit": 1.0}, SoftTimeLimitExceeded), ({"time_limit": 1.0}, TimeLimitExceeded)],
)
def test_a_job_beyond_its_time_limit_fails_and_no_other(
    limit: dict[str, float], error: type[Exception], num_texts: int, events: Events
) -> None:
    job = bulk.send(num_texts, seed=8, **limit)
    neighbour = bulk.send(20, seed=9, soft_time_limit=600, time_limit=600)
    with pytest.raises(error):
        job.get(timeout=TIMEOUT_S)
    assert_free()
    assert neighbour.get(timeout=TIMEOUT_S).dense.shape == (20, 384)
    events.wait_for("failed", job.id)
    assert events.types(job.id) == ["received", "started", "failed"]


def test_a_job_within_its_time_limits_is_answered(events: Events) -> None:
    job = tasks.embed.apply_async((["x"],), soft_time_limit=30, time_limit=60)
    assert job.get(timeout=TIMEOUT_S).dense.shape == (1, 384)


@pytest.mark.parametrize("command", ["pool_grow", "pool_shrink"])
def test_changing_the_pool_s_size_is_answered_and_does_no_harm(command: str, events: Events) -> None:
    answer = control(getattr(tasks.app.control, command), 1)
    assert "ok" in answer or "size" in answer["error"], answer
    assert tasks.embed.delay(["x"]).get(timeout=TIMEOUT_S).dense.shape == (1, 384)


def control(command: Any, *args: Any) -> Any:
    """The answer of the session's worker to a command."""
    (answer,) = command(*args, destination=[WORKER], reply=True, timeout=TIMEOUT_S, limit=1)
    return answer[WORKER]
