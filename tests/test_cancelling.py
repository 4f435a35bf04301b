"""Jobs that nobody wants any more: answered at once, their places free within half a second, and no neighbour harmed.

A bulk job keeps the real worker busy meanwhile, so that others have to wait.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
from celery import chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError

from embedq import tasks
from embedq.core.errors import InvalidInput, ServerUnavailable
from embedq.tasks.cancelling import ids_of
from tests import bulk
from tests.events import TIMEOUT_S, Events

#: Seconds from `cancel` to the place of a job being free.
FREE_S = 0.5

#: A job as large as most are allowed to be.
NUM_TEXTS = 10_000


@pytest.fixture(scope="module")
def events(worker: dict[str, str]) -> Iterator[Events]:
    with Events() as events:
        yield events


@pytest.fixture
def running(events: Events) -> Iterator[Any]:
    """A bulk job that is being computed until the test ends."""
    with bulk.busy(NUM_TEXTS, events) as job:
        yield job


def assert_revoked(job: Any) -> None:
    with pytest.raises(TaskRevokedError, match="cancelled"):
        job.get(timeout=TIMEOUT_S)
    assert job.state == "REVOKED"


def assert_free(started_s: float, num_s: float = FREE_S) -> None:
    assert time.monotonic() - started_s <= num_s


@pytest.mark.timing
def test_a_running_job_of_ten_thousand_texts_is_freed_within_half_a_second(running: Any, events: Events) -> None:
    neighbour = bulk.send(20, seed=5)
    bulk.is_taken(neighbour, events)
    started_s = time.monotonic()
    assert tasks.cancel(running) == {running.id: "running"}
    assert_free(started_s)
    assert_revoked(running)
    assert_free(started_s)
    assert events.wait_for("revoked", running.id)["terminated"] is True
    # The batch both had rows in was not interrupted.
    np.testing.assert_allclose(
        neighbour.get(timeout=TIMEOUT_S).dense, bulk.send(20, seed=5).get(timeout=TIMEOUT_S).dense, atol=1e-5
    )


@pytest.mark.timing
def test_a_waiting_job_of_ten_thousand_texts_is_freed_within_half_a_second(running: Any, events: Events) -> None:
    job, neighbour = bulk.send(NUM_TEXTS, seed=2), bulk.send(20, seed=3)
    bulk.is_taken(job, events)
    started_s = time.monotonic()
    assert tasks.cancel(job) == {job.id: "waiting"}
    assert_free(started_s)
    assert_revoked(job)
    assert not running.ready(), "the cancelled job had to wait for its turn"
    events.wait_for("revoked", job.id)
    assert "started" not in events.types(job.id)
    tasks.cancel(running)
    assert neighbour.get(timeout=TIMEOUT_S).dense.shape == (20, 384)


@pytest.mark.timing
def test_a_job_that_waits_in_the_worker_is_freed_within_half_a_second(running: Any, events: Events) -> None:
    # Taken for its priority; by its size it waits behind the other.
    job = tasks.embed.apply_async((bulk.texts(NUM_TEXTS, seed=4),), priority=0)
    events.wait_for("received", job.id)
    started_s = time.monotonic()
    assert tasks.cancel(job) == {job.id: "waiting"}
    assert_revoked(job)
    assert_free(started_s)
    events.wait_for("revoked", job.id)
    assert "started" not in events.types(job.id)
    assert not running.ready()


@pytest.mark.timing
def test_hundreds_of_waiting_jobs_are_cancelled_together(running: Any, events: Events) -> None:
    jobs = tasks.embed_many([["a text"]] * 600, sending={"priority": 9})
    started_s = time.monotonic()
    found = tasks.cancel(jobs, wait_s=TIMEOUT_S)
    assert list(found) == [job.id for job in jobs]
    assert set(found.values()) == {"waiting"}
    assert_free(started_s, 5.0)
    for job in jobs:
        assert_revoked(job)
        events.wait_for("revoked", job.id)


def test_a_job_that_has_its_answer_keeps_it(worker: dict[str, str]) -> None:
    done, failed = tasks.embed.delay(["x"]), tasks.app.send_task("tasks.embed", ([],), {"outputs": 5}, queue="embed")
    vectors = done.get(timeout=TIMEOUT_S)
    failed.get(timeout=TIMEOUT_S, propagate=False)
    assert tasks.cancel([done, failed]) == {done.id: "done", failed.id: "done"}
    np.testing.assert_array_equal(tasks.app.AsyncResult(done.id).get(timeout=TIMEOUT_S).dense, vectors.dense)
    assert failed.state == "FAILURE"


def test_a_job_that_nobody_knows_is_unknown_and_never_run(worker: dict[str, str], events: Events) -> None:
    job_id = str(uuid.uuid4())
    assert tasks.cancel(job_id, wait_s=0.2) == {job_id: "unknown"}
    assert tasks.cancel(job_id) == {job_id: "done"}
    job = tasks.embed.apply_async((["x"],), task_id=job_id)
    events.wait_for("revoked", job_id)
    assert_revoked(job)
    assert "started" not in events.types(job_id)


def test_jobs_of_a_group_are_cancelled(running: Any, events: Events) -> None:
    jobs = group(tasks.embed.s(["a text"]).set(priority=9) for _ in range(3))()
    assert tasks.cancel(jobs) == {job.id: "waiting" for job in jobs.results}
    with pytest.raises(TaskRevokedError):
        jobs.get(timeout=TIMEOUT_S)


def test_all_parts_of_a_chain_are_cancelled(running: Any, events: Events) -> None:
    last = chain(tasks.embed.si(["one"]).set(priority=9), tasks.embed.si(["two"]), tasks.embed.si(["three"]))()
    first = last.parent.parent
    found = tasks.cancel(last, wait_s=0.5)
    assert found == {last.id: "unknown", last.parent.id: "unknown", first.id: "waiting"}
    for job in (last, last.parent, first):
        assert_revoked(job)


def test_a_chord_is_cancelled_with_its_parts(running: Any, events: Events) -> None:
    body = chord([tasks.embed.si(["one"]).set(priority=9), tasks.embed.si(["two"]).set(priority=9)])(
        tasks.embed.si(["three"])
    )
    parts = body.parent.results
    found = tasks.cancel(body, wait_s=0.5)
    assert {found[part.id] for part in parts} == {"waiting"}
    for part in parts:
        events.wait_for("revoked", part.id)
    assert_revoked(body)


def test_a_chord_of_which_a_part_is_cancelled_fails(running: Any, events: Events) -> None:
    body = chord([tasks.embed.si(["one"]), tasks.embed.si(["two"]).set(priority=9)])(tasks.embed.si(["three"]))
    first, part = body.parent.results
    assert first.get(timeout=TIMEOUT_S).dense.shape == (1, 384)
    assert tasks.cancel(part) == {part.id: "waiting"}
    assert isinstance(body.get(timeout=TIMEOUT_S, propagate=False), ChordError)


def test_a_job_that_waits_for_its_countdown_is_freed(events: Events) -> None:
    job = tasks.embed.apply_async((["x"],), countdown=600)
    events.wait_for("received", job.id)
    assert tasks.cancel(job) == {job.id: "waiting"}
    events.wait_for("revoked", job.id)
    assert_revoked(job)
    (answer,) = tasks.app.control.inspect(timeout=TIMEOUT_S, limit=1).scheduled().values()
    assert job.id not in str(answer)


def test_a_cancelled_job_ends_a_wait_in_asyncio(running: Any, events: Events) -> None:
    async def cancelled() -> dict[str, str]:
        job = bulk.send(1, seed=6)
        waiting = asyncio.ensure_future(tasks.aget(job, timeout=TIMEOUT_S))
        found = await tasks.acancel(job)
        with pytest.raises(TaskRevokedError, match="cancelled"):
            await waiting
        return dict(found)

    assert list(asyncio.run(cancelled()).values()) == ["waiting"]


@pytest.mark.parametrize("wrong", [None, 7, b"id", {"a": 1}, "", "x" * 201, [None]])
def test_only_jobs_can_be_cancelled(wrong: Any) -> None:
    with pytest.raises(InvalidInput):
        ids_of(wrong)


def test_each_job_is_named_once() -> None:
    one = uuid.uuid4()
    assert ids_of([str(one), one, [tasks.app.AsyncResult(str(one)), "two"]]) == [str(one), "two"]


def test_a_server_that_refuses_is_an_error_of_one_line(server: str) -> None:
    with redis.Redis.from_url(server) as client:
        client.execute_command("ACL", "SETUSER", "default", "-eval")
        try:
            with pytest.raises(ServerUnavailable, match="cannot be cancelled"):
                tasks.cancel("an id")
        finally:
            client.execute_command("ACL", "SETUSER", "default", "+@all")
