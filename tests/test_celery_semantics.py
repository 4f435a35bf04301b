"""What Celery promises of any task holds for ours: canvas, callbacks, retries, times, rates, inspection, events.

A real worker of ours with MiniLM, and an application's own worker (`tests/application.py`) beside it.
"""

from __future__ import annotations

import datetime
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
from celery import chain, chord, group, uuid
from celery.exceptions import ChordError
from celery.signals import after_task_publish, before_task_publish

from embedq import tasks
from embedq.core.errors import InvalidInput
from tests import application, bulk
from tests.events import TIMEOUT_S, Events
from tests.running import Running

pytestmark = pytest.mark.usefixtures("worker")

#: The session's worker.
WORKER = f"minilm+reranker.cpu0@{socket.gethostname()}"

#: Length of MiniLM's vectors.
DIM = 384

#: An option that only the worker knows to be wrong.
WRONG = {"dimensions": DIM + 1}


@pytest.fixture(scope="module")
def events(worker: dict[str, str]) -> Iterator[Events]:
    with Events() as events:
        yield events


@pytest.fixture(scope="module")
def other(server: str) -> Iterator[None]:
    """The application's own worker."""
    command = [sys.executable, "-m", "celery", "-A", "tests.application", "worker", "--pool", "solo"]
    with Running([*command, "--loglevel", "INFO"], {"EMBEDQ_REDIS_URL": server}) as running:
        running.wait_for(" ready.")
        yield


def named(name: str, *args: Any, **options: Any) -> Any:
    """A task of the application, as a producer that does not import it writes it."""
    return tasks.app.signature(f"application.{name}", args=args, queue=application.QUEUE, **options)


def inspect(what: str) -> Any:
    """The answer of the session's worker."""
    answer = getattr(tasks.app.control.inspect(destination=[WORKER], timeout=TIMEOUT_S, limit=1), what)()
    return answer[WORKER]


def control(command: str, *args: Any, **kwargs: Any) -> Any:
    """The answer of the session's worker to a command."""
    options = {"destination": [WORKER], "reply": True, "timeout": TIMEOUT_S, "limit": 1}
    (answer,) = getattr(tasks.app.control, command)(*args, **kwargs, **options)
    return answer[WORKER]


def test_a_chain_passes_texts_in_and_vectors_on(other: None) -> None:
    steps = chain(named("split", "One. Two. Three"), tasks.embed.s(), named("shape"))
    assert steps.apply_async().get(timeout=TIMEOUT_S) == [3, DIM]


def test_a_chain_ends_where_a_job_fails(other: None, events: Events) -> None:
    last = chain(tasks.embed.s(["x"], **WRONG), named("shape")).apply_async()
    with pytest.raises(InvalidInput, match="up to 384"):
        last.get(timeout=TIMEOUT_S)
    assert last.parent.state == "FAILURE"


def test_a_chain_goes_on_after_a_step_that_was_retried(other: None) -> None:
    vectors = chain(named("unsteady", ["one", "two"]), tasks.embed.s()).apply_async().get(timeout=TIMEOUT_S)
    assert vectors.dense.shape == (2, DIM)


def test_a_group_keeps_order_and_tells_which_job_failed() -> None:
    parts = [["a"], ["b", "c"], ["d", "e", "f"]]
    jobs = group([*(tasks.embed.s(part) for part in parts), tasks.embed.s(["x"], **WRONG)]).apply_async()
    *good, bad = jobs.get(timeout=TIMEOUT_S, propagate=False)
    together = tasks.embed.delay(["a", "b", "c", "d", "e", "f"]).get(timeout=TIMEOUT_S)
    np.testing.assert_allclose(np.concatenate([part.dense for part in good]), together.dense, atol=1e-5)
    assert isinstance(bad, InvalidInput)


def test_a_chord_hands_all_vectors_in_order_to_its_body(other: None) -> None:
    header = [tasks.embed.s([f"text {index}"] * index) for index in range(1, 9)]
    shapes = chord(header)(named("shapes")).get(timeout=TIMEOUT_S)
    assert shapes == [[index, DIM] for index in range(1, 9)]


def test_a_chord_may_end_in_one_of_our_tasks() -> None:
    body = tasks.rerank.si("a cat", ["a dog", "a cat"])
    ranking = chord([tasks.embed.s(["x"]), tasks.embed.s(["y"])])(body).get(timeout=TIMEOUT_S)
    assert list(ranking.order) == [1, 0]


def test_a_chord_with_a_failed_job_fails(other: None) -> None:
    body = chord([tasks.embed.s(["x"]), tasks.embed.s(["y"], **WRONG)])(named("shapes"))
    with pytest.raises(ChordError, match="InvalidInput"):
        # By its id: the result that knows its header tells the first error of either, as they come.
        tasks.app.AsyncResult(body.id).get(timeout=TIMEOUT_S)


def test_link_calls_back_with_the_vectors(other: None) -> None:
    called = uuid()
    tasks.embed.apply_async((["one", "two"],), link=named("shape").set(task_id=called))
    assert tasks.app.AsyncResult(called).get(timeout=TIMEOUT_S) == [2, DIM]


def test_link_error_calls_back_with_the_job_and_link_does_not(other: None, events: Events) -> None:
    called, not_called = uuid(), uuid()
    job = tasks.embed.apply_async(
        (["x"],), WRONG, link_error=named("note").set(task_id=called), link=named("note").set(task_id=not_called)
    )
    assert tasks.app.AsyncResult(called).get(timeout=TIMEOUT_S) == [job.id]
    assert tasks.app.AsyncResult(not_called).state == "PENDING"


def test_a_job_whose_result_nobody_wants_leaves_none(server: str, events: Events) -> None:
    good = tasks.embed.apply_async((["x"],), ignore_result=True)
    bad = tasks.embed.apply_async((["x"],), WRONG, ignore_result=True)
    kept = tasks.embed.delay(["x"])
    events.wait_for("succeeded", good.id)
    events.wait_for("failed", bad.id)
    kept.get(timeout=TIMEOUT_S)
    with redis.Redis.from_url(server) as client:
        assert [client.exists(f"celery-task-meta-{job.id}") for job in (good, bad, kept)] == [0, 0, 1]


def test_countdown_and_eta_hold_a_job_back_and_no_other(events: Events) -> None:
    due = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1.5)
    held = [tasks.embed.apply_async((["x"],), countdown=1.5), tasks.embed.apply_async((["y"],), eta=due)]
    for job in held:
        events.wait_for("received", job.id)
    scheduled = inspect("scheduled")
    assert {job.id for job in held} <= {entry["request"]["id"] for entry in scheduled}
    tasks.embed.delay(["z"]).get(timeout=TIMEOUT_S)
    assert [events.types(job.id) for job in held] == [["received"], ["received"]]
    for job in held:
        assert job.get(timeout=TIMEOUT_S).dense.shape == (1, DIM)
        assert events.wait_for("started", job.id)["timestamp"] > due.timestamp() - 0.05


def test_a_scheduled_job_can_be_revoked(events: Events) -> None:
    job = tasks.embed.apply_async((["x"],), countdown=1)
    events.wait_for("received", job.id)
    job.revoke()
    assert events.wait_for("revoked", job.id)["expired"] is False
    assert job.state == "REVOKED"
    assert events.types(job.id) == ["received", "revoked"]


def test_a_rate_limit_spaces_the_jobs_of_a_kind(events: Events) -> None:
    assert "ok" in control("rate_limit", "tasks.embed", "10/s")
    try:
        jobs = [tasks.embed.delay([f"text {index}"]) for index in range(6)]
        tasks.rerank.delay("a cat", ["a dog", "a cat"]).get(timeout=TIMEOUT_S)
        starts = sorted(events.wait_for("started", job.id)["timestamp"] for job in jobs)
    finally:
        assert "ok" in control("rate_limit", "tasks.embed", None)
    assert starts[-1] - starts[0] >= 5 / 10 * 0.9
    assert all(job.get(timeout=TIMEOUT_S).dense.shape == (1, DIM) for job in jobs)


def test_inspection_shows_every_job_a_worker_holds_once_and_no_text(events: Events) -> None:
    with bulk.busy(bulk.num_texts_of(2), events) as running:
        waiting = [bulk.send(4, seed) for seed in range(10, 15)]
        taken = {running.id, *(job.id for job in waiting if bulk.is_taken(job, events))}
        active, reserved = inspect("active"), inspect("reserved")
    assert running.id in {entry["id"] for entry in active}
    shown = [entry["id"] for entry in (*active, *reserved)]
    assert len(shown) == len(set(shown))
    assert taken <= set(shown) <= {running.id, *(job.id for job in waiting)}
    assert all(re.fullmatch(r"[\d,]+ texts, [\d,]+ characters", entry["args"]) for entry in (*active, *reserved))
    assert all(job.get(timeout=TIMEOUT_S).dense.shape == (4, DIM) for job in waiting)


def test_every_job_has_its_events_once_and_in_order(events: Events) -> None:
    good = [tasks.embed.delay([f"text {index}"]) for index in range(40)]
    bad = [tasks.embed.delay(["x"], **WRONG) for _ in range(5)]
    for job in good:
        job.get(timeout=TIMEOUT_S)
        events.wait_for("succeeded", job.id)
    for job in bad:
        event = events.wait_for("failed", job.id)
        assert "up to 384 for model minilm; given 385" in event["exception"]
    assert [events.types(job.id) for job in good] == [["received", "started", "succeeded"]] * len(good)
    assert [events.types(job.id) for job in bad] == [["received", "started", "failed"]] * len(bad)
    for job in good:
        times = [event["timestamp"] for event in events.of(job.id)]
        assert times == sorted(times)


def test_the_producer_s_signals_are_sent_without_a_text() -> None:
    sent: list[Any] = []

    def hear(sender: str, headers: dict[str, Any], **_: Any) -> None:
        sent.append((sender, headers["id"], headers["argsrepr"]))

    before_task_publish.connect(hear)
    after_task_publish.connect(hear)
    try:
        job = tasks.embed.delay(["a very private sentence"])
    finally:
        before_task_publish.disconnect(hear)
        after_task_publish.disconnect(hear)
    assert sent == [("tasks.embed", job.id, "1 text, 23 characters")] * 2
    job.get(timeout=TIMEOUT_S)
