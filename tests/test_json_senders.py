"""Answers in JSON, and what follows a job that came in JSON: decided by the message alone, the same in all else."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import redis
from celery import Celery, chain, chord, group, signature
from celery.app.task import Context
from celery.exceptions import TaskError
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.json import dumps

from embedq import tasks
from embedq.core.codec import DTYPES, json_form, pack, unpack, unpack_json
from embedq.core.errors import InvalidInput
from embedq.core.results import Embeddings, Ranking, Sparse
from embedq.workers.jobs.json_senders import HEADER, follow_in_json, in_json, wants_json
from tests import application, json_application

IN_JSON = {HEADER: "json"}

TIMEOUT_S = 60

#: Two tasks of an application, and one of ours.
STORE, MORE, OURS = signature("store"), signature("more"), signature("tasks.embed")

RESULTS: list[Any] = [
    Embeddings(dense=np.arange(6, dtype=np.float32).reshape(2, 3), model="m", revision="r"),
    Embeddings(dense=np.ones((1, 2), np.int8), int8_ranges=np.zeros((2, 2), np.float32)),
    Embeddings(sparse=[Sparse(np.array([1, 5], np.int32), np.array([0.5, 1], np.float32))], colbert=[np.ones((2, 3), np.float32)]),
    Ranking(np.array([0.5, 1.5], np.float32), np.array([1, 0], np.int32), "m", np.zeros((2, 2), np.float32)),
    [Embeddings(dense=np.empty((0, 3), np.float32)), None, {"a": [1.5, True, "x"]}],
]  # fmt: skip


@pytest.mark.parametrize("result", RESULTS, ids=repr)
def test_json_carries_all_that_msgpack_does(result: Any) -> None:
    text = json.dumps(json_form(result)).encode()
    assert pack(unpack_json(text)) == pack(unpack(pack(result))) == pack(result)


@pytest.mark.parametrize("result", RESULTS[:4], ids=repr)
def test_kombus_json_writes_results_in_the_same_form(result: Any) -> None:
    assert json.loads(dumps([result])) == [json_form(result)]


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 100), max_size=8))
def test_arrays_of_every_type_come_back(dtype: str, numbers: list[int]) -> None:
    array = np.array(numbers, dtype)
    back = unpack_json(json.dumps(json_form(array)).encode())
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


@pytest.mark.parametrize(
    "text", ['{"dtype":"<f4","shape":[9],"data":"AAAA"}', '{"dtype":"O","shape":[1],"data":"AAAA"}', '{"dtype":"<f4","shape":[1],"data":"?"}', "{"]
)  # fmt: skip
def test_malformed_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        unpack_json(text.encode())


@pytest.mark.parametrize("headers", [None, {}, {HEADER: "msgpack"}, {HEADER: True}, [HEADER]])
def test_who_does_not_ask_for_json_gets_msgpack(headers: Any) -> None:
    assert not wants_json(Context(headers=headers))
    assert not wants_json(None)


def test_an_error_of_ours_has_a_class_that_every_celery_has_and_others_keep_theirs() -> None:
    ours = {"exc_type": "InvalidInput", "exc_module": "embedq.core.errors", "exc_message": ("wrong",)}
    written = json.loads(in_json({"status": "FAILURE", "result": ours}))["result"]
    assert written == {
        "exc_type": "TaskError",
        "exc_module": "celery.exceptions",
        "exc_message": ["InvalidInput: wrong"],
        "error": "InvalidInput",
    }
    theirs = {"exc_type": "TaskRevokedError", "exc_module": "celery.exceptions", "exc_message": ("revoked",)}
    assert json.loads(in_json({"status": "REVOKED", "result": theirs}))["result"] == theirs | {
        "exc_message": ["revoked"]
    }


def follows_of(content_type: str = "application/json", headers: Any = None, **options: Any) -> dict[str, Any]:
    """What follows a job, as its message leaves it: one task of an application's, one of ours, one of Celery's."""
    follows = {
        "chain": [signature("mine.store", options=options), signature("tasks.embed")],
        "errbacks": [signature("celery.accumulate")],
        "callbacks": None,
    }
    given: dict[str, Any] = json.loads(json.dumps(follows))
    follow_in_json(SimpleNamespace(content_type=content_type, headers=headers), given)
    return given


def test_what_follows_a_job_in_json_is_sent_in_json_unless_it_says_otherwise() -> None:
    follows = follows_of()
    assert [one["options"] for one in (*follows["chain"], *follows["errbacks"])] == [{"serializer": "json"}, {}, {}]
    assert follows_of(serializer="pickle")["chain"][0]["options"]["serializer"] == "pickle"
    assert follows_of(content_type="application/x-msgpack")["chain"][0]["options"] == {}


@pytest.mark.parametrize(
    ("follow", "marked"),
    [
        (chain(STORE, MORE), ["store"]),
        (chain(OURS, STORE, MORE), ["store"]),
        (chain(OURS, OURS), []),
        (group(STORE, OURS, MORE), ["store", "more"]),
        (group(chain(OURS, STORE, MORE)), ["store"]),
        (chord([STORE, OURS], MORE), ["store", "more"]),
        (chain(OURS.clone().set(link=[STORE]), MORE), ["store", "more"]),
    ],
    ids=["chain", "ours between", "ours alone", "group", "chain in a group", "chord", "link of ours"],
)
def test_only_what_we_send_is_sent_in_json(follow: Any, marked: list[str]) -> None:
    """What comes after a task of the application is sent by its own worker, as that does it."""
    line = follow.tasks if follow["task"] == "celery.chain" else [follow]
    given = json.loads(json.dumps({"chain": line[::-1]}))
    follow_in_json(SimpleNamespace(content_type="application/json", headers=None), given)
    assert sorted(
        re.findall(r'"task": "(\w+)", [^{}]*"kwargs": {}, "options": {"serializer"', json.dumps(given))
    ) == sorted(marked)


#: What anybody may write where a signature stands.
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["store", "tasks.embed", "group", "chain", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["task", "options", "kwargs", "subtask_type", "tasks", "header", "body", "link", "headers", "chord"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)  # fmt: skip


@given(st.lists(JUNK, max_size=3), JUNK)
def test_nothing_that_arrives_breaks_it(chain: list[Any], chord: Any) -> None:
    follows = {"chain": chain, "callbacks": chain, "errbacks": None, "chord": chord}
    follow_in_json(SimpleNamespace(content_type="application/json", headers=IN_JSON), follows)


def test_signatures_within_signatures_without_end_do_not_break_it() -> None:
    nested: Any = {"task": "store"}
    for _ in range(2000):
        nested = {"task": "celery.group", "subtask_type": "group", "kwargs": {"tasks": [nested]}}
    follow_in_json(SimpleNamespace(content_type="application/json", headers=IN_JSON), {"chain": [nested]})


def test_a_failure_of_what_follows_is_told_as_the_job_would_be() -> None:
    follows = follows_of(headers=IN_JSON)
    assert [one["options"]["headers"] for one in (*follows["chain"], *follows["errbacks"])] == [IN_JSON] * 3
    assert "headers" not in follows_of()["chain"][0]["options"]


@pytest.fixture
def foreign(server: str) -> Any:
    """An application that has nothing of ours, with Celery's own settings."""
    with Celery("foreign", broker=server, backend=server, set_as_current=False) as app:
        yield app


@pytest.mark.usefixtures("worker")
def test_a_sender_by_name_gets_numbers_and_one_class_of_error(foreign: Celery) -> None:
    def send(name: str, *args: Any, **kwargs: Any) -> Any:
        queue = name.removeprefix("tasks.")
        return foreign.send_task(name, args, kwargs, queue=queue, headers=IN_JSON).get(timeout=TIMEOUT_S)

    found = send("tasks.embed", ["one", "two"], dimensions=8)
    assert unpack_json(json.dumps(found).encode()).dense == pytest.approx(
        tasks.embed.delay(["one", "two"], dimensions=8).get(timeout=TIMEOUT_S).dense, abs=1e-6
    )
    ranking = unpack_json(json.dumps(send("tasks.rerank", "two", ["one", "two"], top_k=1)).encode())
    assert (ranking.order.tolist(), len(ranking.scores)) == ([1], 2)
    with pytest.raises(TaskError, match=r"^InvalidInput: dimensions may be up to 384"):
        send("tasks.embed", ["one"], dimensions=999)
    with pytest.raises(TaskError, match=r"^InvalidInput: texts must be a list"):
        send("tasks.embed", "no list")


@pytest.mark.usefixtures("worker")
def test_a_message_that_is_no_job_is_refused_in_json_as_well(foreign: Celery) -> None:
    job = foreign.send_task("tasks.embed", [["a"]], queue="embed", headers=IN_JSON, root_id=5)
    with pytest.raises(TaskError, match="InvalidInput: the message's header root_id has a wrong type"):
        job.get(timeout=TIMEOUT_S)


@pytest.mark.usefixtures("worker")
def test_our_producers_read_an_answer_in_json_and_it_is_final(foreign: Celery, server: str) -> None:
    job = foreign.send_task("tasks.embed", [["one"]], queue="embed", headers=IN_JSON)
    job.get(timeout=TIMEOUT_S)
    with redis.Redis.from_url(server) as client:
        assert client.get(f"celery-task-meta-{job.id}").startswith(b'{"status": "SUCCESS"')
    assert tasks.app.AsyncResult(job.id).get(timeout=TIMEOUT_S).dense.shape == (1, 384)
    with pytest.raises(InvalidInput, match="belongs to another call"):
        tasks.embed.apply_async((["two"],), task_id=job.id).get(timeout=TIMEOUT_S)


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("connected", [application, json_application], ids=["msgpack", "json"])
def test_tasks_of_a_connected_application_get_results_as_such(connected: Any, server: str) -> None:
    """Whatever their messages travel in: read off the queue, where a worker of its own would take it."""
    chain(connected.app.signature("tasks.embed", args=[["one"]]), connected.shape.s().set(queue="unread")).delay()
    with redis.Redis.from_url(server) as client:
        message = json.loads(client.brpop("unread", timeout=TIMEOUT_S)[1])
    assert message["content-type"] == "application/x-embedq-msgpack"
