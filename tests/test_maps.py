"""`map`, `starmap` and `chunks` of our tasks, and other tasks that come to our queues: nobody waits for them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
from celery import Celery, chain, xmap, xstarmap

from embedq import tasks
from embedq.core.engine import Engine
from embedq.core.errors import InvalidInput, JobTooLarge
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.jobs.pool import EnginePool, pool_for
from tests.checkpoints import PATIENCE_S
from tests.consuming import context
from tests.events import TIMEOUT_S, Events
from tests.test_pool import Bookkeeping
from tests.test_transport import wait_until

SECRET = "a very private sentence"


@pytest.fixture(scope="module")
def events(worker: dict[str, str]) -> Iterator[Events]:
    with Events() as events:
        yield events


def vectors_of(texts: list[str], **options: Any) -> np.ndarray:
    """The vectors of a job of its own."""
    return np.asarray(tasks.embed.delay(texts, **options).get(timeout=TIMEOUT_S))


def test_the_items_of_a_starmap_are_one_job_with_each_item_s_own_result(events: Events) -> None:
    lists = [["one", SECRET], [], ["three"]]
    job = tasks.embed.starmap([(texts,) for texts in lists]).apply_async()
    results = job.get(timeout=TIMEOUT_S)
    assert [type(one) for one in results] == [tasks.Embeddings] * 3
    assert [len(one) for one in results] == [2, 0, 1]
    for texts, one in zip(lists, results, strict=True):
        if texts:
            np.testing.assert_allclose(np.asarray(one), vectors_of(texts), atol=1e-5)
    events.wait_for("succeeded", job.id)
    received = events.of(job.id)[0]
    assert received["args"] == "3 texts, 31 characters"
    assert SECRET not in str(events.of(job.id))


def test_map_passes_each_item_alone_and_the_mapped_options_count(worker: dict[str, str]) -> None:
    mapped = tasks.embed.s(dimensions=8, model="minilm")
    results = xmap(mapped, [["one"], ["two"]], app=tasks.app).apply_async().get(timeout=TIMEOUT_S)
    assert [np.asarray(one).shape for one in results] == [(1, 8), (1, 8)]


def test_chunks_of_rerank_are_jobs_of_as_many_items(worker: dict[str, str]) -> None:
    calls = [("a question", ["a text", f"another {index}"]) for index in range(5)]
    chunks = tasks.rerank.chunks(calls, 2).apply_async().get(timeout=TIMEOUT_S)
    assert [[len(one) for one in chunk] for chunk in chunks] == [[2, 2], [2, 2], [2]]
    alone = tasks.rerank.delay(*calls[3]).get(timeout=TIMEOUT_S)
    np.testing.assert_allclose(chunks[1][1].scores, alone.scores, atol=1e-4)


def test_a_map_of_no_items_and_one_within_a_chain_are_answered(worker: dict[str, str]) -> None:
    assert tasks.embed.starmap([]).apply_async().get(timeout=TIMEOUT_S) == []
    steps = chain(tasks.embed.si(["first"]), xstarmap(tasks.embed.s(), [(["one"],)], app=tasks.app))
    (one,) = steps.apply_async().get(timeout=TIMEOUT_S)
    assert len(one) == 1


def test_the_message_of_a_map_says_when_it_was_sent_as_every_job_s_does(server: str) -> None:
    """The exporter computes by it how long the next job has waited."""
    with redis.Redis.from_url(server) as client:
        tasks.embed.starmap([(["one"],)]).apply_async(queue="unread_maps")
        sent_s = json.loads(client.rpop("unread_maps"))["properties"]["timestamp"]
    assert abs(time.time() - sent_s) < TIMEOUT_S


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([(["x"],), ("no list",)], InvalidInput, "texts must be a list"),
        ([(["x"],), 3], InvalidInput, r"an item of a celery\.starmap must be a list of arguments; given int"),
        ([(["x"] * 6_000,), (["x"] * 6_000,)], JobTooLarge, "the 2 items of this one hold 12,000 texts"),
    ],
    ids=["a wrong text", "no arguments", "too much together"],
)
def test_items_are_checked_at_the_call(worker: dict[str, str], items: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        tasks.embed.starmap(items).apply_async()


def test_what_another_program_maps_is_checked_and_hidden_by_the_worker(server: str, events: Events) -> None:
    """A producer with an application of its own knows none of our checks."""
    stock = Celery("stock", broker=server, backend=server, set_as_current=False)
    stock.conf.update(result_serializer="embedq", result_accept_content=["embedq"])
    mapped: dict[str, Any] = {"task": "tasks.embed", "args": [], "kwargs": {}, "options": {}, "subtask_type": None}
    jobs = [
        stock.send_task("celery.starmap", kwargs={"task": mapped, "it": it}, queue="embed")
        for it in ([[[SECRET]]], [[SECRET]], "no list")
    ]
    assert len(jobs[0].get(timeout=TIMEOUT_S)[0]) == 1
    for job in jobs[1:]:
        with pytest.raises(Exception, match="must be a list"):
            job.get(timeout=TIMEOUT_S)
    events.wait_for("succeeded", jobs[0].id)
    events.wait_for("failed", jobs[1].id)
    assert SECRET not in str([events.of(job.id) for job in jobs])
    with redis.Redis.from_url(server) as client:  # one server for many tests: only these jobs count
        wait_until(lambda: not any(job.id.encode() in raw for raw in client.hvals("unacked") for job in jobs))
    stock.close()


def test_arguments_of_other_tasks_are_not_shown(events: Events) -> None:
    job = tasks.app.send_task("celery.accumulate", args=[SECRET, "x"], queue="embed")
    assert job.get(timeout=TIMEOUT_S) == [SECRET, "x"]
    events.wait_for("succeeded", job.id)
    assert events.of(job.id)[0]["args"] == "(not shown)"


def test_a_task_that_is_not_the_engine_s_keeps_no_answer_waiting(app: Celery, engine: Engine) -> None:
    pool: EnginePool = pool_for(context(), HeldJobs(engine))(limit=1, app=app)
    pool.on_start()
    begun, may_end = threading.Event(), threading.Event()
    order: list[str] = []

    def slow() -> tuple[bool, str, float]:
        begun.set()
        may_end.wait(PATIENCE_S)
        order.append("slow")
        return False, "result", 0.0

    request = Bookkeeping(pool)
    callbacks = {"accept_callback": request.accepted, "callback": request.done, "error_callback": request.done}
    pool.on_apply(slow, (), {}, **callbacks, timeout_callback=None)
    assert begun.wait(PATIENCE_S)
    answered = threading.Event()
    pool._answers.submit(lambda: (order.append("answer"), answered.set()))  # type: ignore[arg-type]
    assert answered.wait(PATIENCE_S)
    may_end.set()
    assert request.is_told.wait(PATIENCE_S)
    assert order == ["answer", "slow"]
    assert pool.jobs.wait_until_empty(PATIENCE_S)
    pool.on_stop()
