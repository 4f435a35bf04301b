"""What Celery promises of any task holds for ours: canvas, callbacks, retries, times, rates, inspection, events.

A real worker of ours with MiniLM, and an application's own worker (`tests/application.py`) beside it.
"""

from __future__ import annotations

import datetime
import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import redis
from celery import Signature, chain, chord, group, uuid
from celery.canvas import StampingVisitor
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import GroupResult
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


def inspect(what: str, *args: Any) -> Any:
    """The answer of the session's worker."""
    answer = getattr(tasks.app.control.inspect(destination=[WORKER], timeout=TIMEOUT_S, limit=1), what)(*args)
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


def shapes_of(*parts: list[str]) -> group:
    """A group of ours: the vectors of each part."""
    return group(tasks.embed.si(part) for part in parts)


#: Canvases within canvases, and what each answers with.
NESTED: dict[str, tuple[Callable[[], Signature], Any]] = {
    "chains in a group": (
        lambda: group(chain(tasks.embed.si([text] * 2), named("shape")) for text in "ab"),
        [[2, DIM], [2, DIM]],
    ),
    "a group in a group": (
        lambda: group(chain(tasks.embed.si(["a"]), named("shape")), group(named("note", 1), named("note", 2))),
        [[1, DIM], [1], [2]],
    ),
    "a group behind a group": (
        lambda: chain(shapes_of(["a"], ["b", "c"]), group(named("shapes"), named("shapes"))),
        [[[1, DIM], [2, DIM]]] * 2,
    ),
    "a chord in a chain": (
        lambda: chain(named("split", "One. Two"), group(tasks.embed.s(), tasks.embed.s(dimensions=8)), named("shapes")),
        [[2, DIM], [2, 8]],
    ),
    "a chord in a chord": (
        lambda: chord([chord(shapes_of(["a"], ["b"]), named("shapes")), named("note", 1)], named("note")),
        [[[[1, DIM], [1, DIM]], [1]]],
    ),
}


@pytest.mark.parametrize("kind", NESTED)
def test_canvases_nest(other: None, kind: str) -> None:
    canvas, expected = NESTED[kind]
    assert canvas().apply_async().get(timeout=TIMEOUT_S) == expected


#: Canvases with one job that fails, and where an error callback is put into them. Each takes the failing job.
FAILING: dict[str, Callable[[Signature], Signature]] = {
    "a chain": lambda failing: chain(failing, named("shape")),
    "a group": lambda failing: group(tasks.embed.si(["y"]), failing),
    "a chord's header": lambda failing: chord([tasks.embed.si(["y"]), failing], named("shapes")),
    "a chord's body": lambda failing: chord([named("note", 1), named("note", 2)], failing),
}


@pytest.mark.filterwarnings("ignore:task_allow_error_cb_on_chord_header")  # of its default, which is ours
@pytest.mark.parametrize("kind", FAILING)
def test_an_error_callback_of_a_canvas_is_called_once_when_a_job_of_it_fails(other: None, kind: str) -> None:
    called = uuid()
    canvas = FAILING[kind](tasks.embed.si(["x"], **WRONG))
    canvas.link_error(named("note", "failed").set(task_id=called, immutable=True))
    with pytest.raises((InvalidInput, ChordError), match="up to 384"):
        canvas.apply_async().get(timeout=TIMEOUT_S)
    assert tasks.app.AsyncResult(called).get(timeout=TIMEOUT_S) == ["failed"]


def test_a_task_may_be_replaced_by_jobs_of_ours(other: None) -> None:
    parts = named("embed_each", ["one", "two"]).apply_async().get(timeout=TIMEOUT_S)
    assert [part.dense.shape for part in parts] == [(1, DIM)] * 2
    steps = chain(named("note", "one", "two"), named("embed_each"), named("shapes"))
    assert steps.apply_async().get(timeout=TIMEOUT_S) == [[1, DIM]] * 2


def test_a_job_of_ours_may_be_added_to_a_chord_that_runs(other: None) -> None:
    header = [named("embed_too", ["one", "two"]), named("note", 1)]
    body = chord(header)(named("note"))
    (parts,) = body.get(timeout=TIMEOUT_S)  # Celery gives what was added the place of what added it, in either order
    (vectors,) = (part for part in parts if isinstance(part, tasks.Embeddings))
    assert np.shape(vectors) == (2, DIM)
    assert parts[2] == [1]
    assert None in parts


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # by Celery, which saves groups so
def test_a_saved_group_is_restored_by_its_id_alone() -> None:
    jobs = shapes_of(["a"], ["b", "c"]).apply_async()
    jobs.save()
    restored = GroupResult.restore(jobs.id, app=tasks.app)
    assert [part.dense.shape[0] for part in restored.get(timeout=TIMEOUT_S)] == [1, 2]
    assert restored == jobs
    restored.delete()
    assert GroupResult.restore(jobs.id, app=tasks.app) is None


def test_a_result_knows_the_jobs_that_came_of_it(other: None) -> None:
    last = chain(tasks.embed.si(["one"]), named("shape")).apply_async()
    assert last.get(timeout=TIMEOUT_S) == [1, DIM]
    first = tasks.app.AsyncResult(last.parent.id)
    assert [child.id for child in first.children] == [last.id]
    assert [job.id for job, _ in first.collect()] == [first.id, last.id]


class Stamping(StampingVisitor):
    """Stamps each job of a canvas with who pays for it."""

    def __init__(self, payer: str) -> None:
        self.payer = payer

    def on_signature(self, sig: Signature, **_: Any) -> dict[str, Any]:
        return {"payer": self.payer}


def test_stamps_travel_with_every_job_of_a_canvas(other: None) -> None:
    canvas = chain(tasks.embed.si(["x"]), named("stamps"), chord([named("stamps")] * 2, named("note")))
    canvas.stamp(visitor=Stamping("me"))
    assert canvas.apply_async().get(timeout=TIMEOUT_S) == [[{"payer": "me"}] * 2]


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


def test_jobs_can_be_revoked_by_their_stamps(events: Events) -> None:
    stamped, other = tasks.embed.si(["x"]), tasks.embed.si(["y"])
    stamped.stamp(visitor=Stamping("nobody"))
    other.stamp(visitor=Stamping("me"))
    revoked, kept = stamped.apply_async(countdown=1), other.apply_async(countdown=1)
    events.wait_for("received", revoked.id)
    events.wait_for("received", kept.id)
    revoked.revoke_by_stamped_headers({"payer": ["nobody"]})
    with pytest.raises(TaskRevokedError):
        revoked.get(timeout=TIMEOUT_S)
    assert kept.get(timeout=TIMEOUT_S).dense.shape == (1, DIM)
    assert events.types(revoked.id) == ["received", "revoked"]


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


def test_every_command_of_inspection_is_answered_without_a_text(events: Events) -> None:
    job = tasks.embed.apply_async((["a very private sentence"],), countdown=2)
    events.wait_for("received", job.id)
    names = (
        "ping",
        "clock",
        "registered",
        "active_queues",
        "stats",
        "report",
        "conf",
        "scheduled",
        "reserved",
        "active",
    )
    answers = {name: inspect(name) for name in names}
    answers["query_task"] = inspect("query_task", job.id)
    job.revoke()
    events.wait_for("revoked", job.id)
    answers["revoked"] = inspect("revoked")
    assert answers["ping"] == {"ok": "pong"}
    assert answers["clock"]["clock"] > 0
    assert {"tasks.embed", "tasks.rerank"} <= set(answers["registered"])
    assert {"embed", "embed.minilm", "rerank.reranker"} <= {queue["name"] for queue in answers["active_queues"]}
    assert answers["conf"]["task_serializer"] == "embedq"
    assert "software -> celery" in answers["report"]["ok"]
    assert job.id in answers["query_task"]
    assert job.id in answers["revoked"]
    assert "private" not in str(answers)


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
