"""The options of sending a job are checked at the call, and an id belongs to one call."""

from __future__ import annotations

import asyncio
import math
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from embedq import tasks
from embedq.core.engine import Engine
from embedq.core.errors import InvalidInput, UnknownModel
from embedq.tasks.sending import checked_sending
from embedq.testing.computing_here import computing_with
from tests.events import TIMEOUT_S
from tests.pools import TINY
from tests.running import ROOT

QUEUE = {"queue": "unread"}


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    """The server whose list `unread` nobody reads."""
    with redis.Redis.from_url(server) as client:
        yield client
        client.delete("unread")


@pytest.mark.parametrize(
    ("sending", "message"),
    [
        ({"task_id": 7}, "task_id must be a text of at most 200 characters, or a UUID; given 7"),
        ({"task_id": "x" * 201}, "task_id must be a text of at most 200"),
        ({"task_id": b"bytes"}, "task_id must be .* given b'bytes'"),
        ({"root_id": 1.5}, "root_id must be"),
        ({"priority": 10}, "priority must be a whole number from 0, first, to 9; given 10"),
        ({"priority": -1}, "given -1"),
        ({"priority": "high"}, "given 'high'"),
        ({"priority": True}, "given True"),
        ({"time_limit": "60"}, "time_limit must be seconds from 0 to .*; given '60'"),
        ({"time_limit": math.inf}, "given inf"),
        ({"soft_time_limit": -1}, "soft_time_limit must be seconds .* given -1"),
        ({"countdown": math.nan}, "countdown must be a number of seconds; given nan"),
        ({"eta": 5}, "eta must be a datetime; given 5"),
        ({"expires": [1]}, r"expires must be .* given \[1\]"),
        ({"headers": ["x"]}, r"headers must be a map .* given \['x'\]"),
        ({"headers": {"x": object()}}, "headers must be a map of texts to values that JSON can carry"),
        ({"headers": {1: "x"}}, "headers must be"),
        ({"ignore_result": "no"}, "ignore_result must be True or False; given 'no'"),
    ],
    ids=lambda value: re.sub(r" at 0x[0-9a-f]+", "", str(value)),
)
def test_a_wrong_way_to_send_is_refused_with_its_value_before_anything_is_sent(
    client: redis.Redis, sending: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        tasks.embed.apply_async((["x"],), **QUEUE, **sending)
    with pytest.raises(InvalidInput):
        tasks.embed_many([["x"]], {**QUEUE, **sending})
    with pytest.raises(InvalidInput, match=message):
        tasks.embed.starmap([(["x"],)]).apply_async(**QUEUE, **sending)
    assert client.llen("unread") == 0


@given(
    st.dictionaries(
        st.sampled_from(["task_id", "priority", "time_limit", "countdown", "headers", "expires", "shadow"]),
        st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=300), st.uuids(), st.lists(st.integers())),
    )
)
def test_whatever_is_given_is_refused_as_invalid_input_or_can_be_sent(sending: dict[str, Any]) -> None:
    try:
        checked = checked_sending(sending)
    except InvalidInput:
        return
    assert not any(isinstance(value, uuid.UUID) for value in checked.values())
    assert checked.get("priority") in (None, *range(10))


def test_a_uuid_is_an_id_for_us_as_for_celery(worker: dict[str, str]) -> None:
    chosen = uuid.uuid4()
    job = tasks.embed.apply_async((["one"],), task_id=chosen)
    assert job.id == str(chosen)
    assert len(job.get(timeout=TIMEOUT_S)) == 1
    assert len(tasks.app.AsyncResult(str(chosen)).get(timeout=TIMEOUT_S)) == 1


def test_a_uuid_that_another_application_sends_by_name_is_answered(worker: dict[str, str], server: str) -> None:
    stock = Celery("stock", broker=server, backend=server, set_as_current=False)
    stock.conf.update(result_serializer="embedq", result_accept_content=["embedq"])
    chosen = uuid.uuid4()
    stock.send_task("tasks.embed", args=[["one"]], queue="embed", task_id=chosen)
    assert len(stock.AsyncResult(str(chosen)).get(timeout=TIMEOUT_S)) == 1
    stock.close()


def test_many_jobs_have_ids_of_their_own(worker: dict[str, str]) -> None:
    ids = [uuid.uuid4() for _ in range(3)]
    jobs = tasks.embed_many([["one"], ["two"], ["three"]], task_ids=ids)
    assert [job.id for job in jobs] == [str(one) for one in ids]
    assert [len(job.get(timeout=TIMEOUT_S)) for job in jobs] == [1, 1, 1]
    (other,) = tasks.embed_many([["four"]], task_ids=[ids[0]])
    with pytest.raises(InvalidInput, match="belongs to another call"):
        other.get(timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sending": {"task_id": "x"}}, "one task_id cannot be the id of many jobs"),
        ({"task_ids": ["x"]}, "task_ids must be 2 different ids, one for each job; given 1"),
        ({"task_ids": ["x", "x"]}, "2 different ids"),
        ({"task_ids": ["x", 3]}, "task_id must be a text"),
    ],
    ids=lambda value: re.sub(r" at 0x[0-9a-f]+", "", str(value)),
)
def test_wrong_ids_of_many_jobs_are_refused(client: redis.Redis, given: dict[str, Any], message: str) -> None:
    given = {**given, "sending": {**QUEUE, **given.get("sending", {})}}
    with pytest.raises(InvalidInput, match=message):
        tasks.embed_many([["one"], ["two"]], **given)
    with pytest.raises(InvalidInput, match=message):
        tasks.rerank_many([("q", ["one"]), ("q", ["two"])], **given)
    assert client.llen("unread") == 0


def test_an_id_that_was_answered_is_an_error_for_another_call_and_the_answer_for_the_same(
    worker: dict[str, str],
) -> None:
    chosen = str(uuid.uuid4())
    first = tasks.embed.apply_async((["one text"],), {"dtype": "float32"}, task_id=chosen).get(timeout=TIMEOUT_S)
    again = tasks.embed.apply_async((), {"texts": ["one text"], "dtype": "float32"}, task_id=chosen)
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again.get(timeout=TIMEOUT_S)))
    others: list[Any] = [
        tasks.embed.apply_async((["another text"],), task_id=chosen),
        tasks.embed.apply_async((["one text"],), {"dtype": "float16"}, task_id=chosen),
        tasks.rerank.apply_async(("one text", ["one text"]), task_id=chosen),
    ]
    for other in others:
        with pytest.raises(InvalidInput, match=f"task_id '{chosen}' belongs to another call"):
            other.get(timeout=TIMEOUT_S)
        with pytest.raises(InvalidInput, match="belongs to another call"):
            asyncio.run(tasks.aget(other, timeout=TIMEOUT_S))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(tasks.app.AsyncResult(chosen).get(timeout=TIMEOUT_S)))


def test_of_two_calls_that_wait_under_one_id_one_fails(worker: dict[str, str]) -> None:
    chosen = uuid.uuid4()
    jobs = [tasks.embed.apply_async(([text],), task_id=chosen) for text in ("one text", "another text")]
    answers = [job.get(timeout=TIMEOUT_S, propagate=False) for job in jobs]
    assert sorted(type(answer).__name__ for answer in answers) == ["Embeddings", "InvalidInput"]


def test_the_id_of_any_answered_job_counts(worker: dict[str, str]) -> None:
    job = tasks.embed.delay(["one text"])
    job.get(timeout=TIMEOUT_S)
    with pytest.raises(InvalidInput, match="belongs to another call"):
        tasks.embed.apply_async((["another text"],), task_id=job.id).get(timeout=TIMEOUT_S)


def test_equal_calls_have_one_fingerprint_and_others_have_others() -> None:
    mark = tasks.embed.fingerprint
    assert mark((["a"],), {"model": "m", "outputs": {"dense", "sparse"}}) == mark(
        (), {"outputs": ["dense", "sparse"], "texts": ["a"], "model": "m"}
    )
    calls = [((["a"],), {}), ((["a", ""],), {}), ((["b"],), {}), ((["a"],), {"model": "m"})]
    assert len({mark(*call) for call in calls} | {tasks.rerank.fingerprint(("a", ["a"]), {})}) == 5


@pytest.fixture
def eager(engine: Engine) -> Iterator[None]:
    """Jobs are computed in this process, by an engine that the application has loaded."""
    with computing_with(engine):
        yield


def test_jobs_are_computed_in_process_where_celery_is_set_so(eager: None) -> None:
    job = tasks.embed.delay(["one", "two"])
    assert len(job.get()) == 2
    assert len(asyncio.run(tasks.aget(job))) == 2
    assert [len(one.get()) for one in tasks.embed_many([["one"], ["two"]], {"priority": 9})] == [1, 1]
    assert [len(one) for one in tasks.embed.starmap([(["one"],), (["two", "three"],)]).apply_async().get()] == [1, 2]
    with pytest.raises(UnknownModel, match="unknown model"):
        tasks.embed.delay(["x"], model="nobody").get()
    with pytest.raises(InvalidInput):
        tasks.embed.delay("no list")


def test_a_task_that_is_called_says_what_to_do() -> None:
    with pytest.raises(
        InvalidInput, match=r"send it with \.delay.*core\.load.*task_always_eager = True and EMBEDQ_MODELS"
    ):
        tasks.embed(["x"])


def test_the_models_of_the_settings_are_loaded_once_for_eager_jobs() -> None:
    script = (
        "from embedq import tasks\n"
        "tasks.app.conf.task_always_eager = True\n"
        "print([len(tasks.embed.delay(texts).get()) for texts in (['a'], ['b', 'c'])], len(tasks.embed(['d'])))\n"
    )
    environment = {**os.environ, "EMBEDQ_MODELS": f"tiny={TINY}", "EMBEDQ_REDIS_URL": "redis://127.0.0.1:1/0"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout == "[1, 2] 1\n", done.stderr
