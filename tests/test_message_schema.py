"""The shape of a message: what any producer sends passes, a field of another type is refused by its name."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
import redis
from celery import chain, chord, group

from embedq import tasks
from embedq.core.codec import pack, unpack
from embedq.core.errors import InvalidInput
from embedq.workers.jobs.message_schema import Misshapen, check_shape
from tests.test_rejected_messages import put
from tests.test_transport import wait_until

BODY = [[["a text"]], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]

#: Where no worker looks.
QUEUE = "shape"


def job(text: str) -> Any:
    """A job that waits for nobody."""
    return tasks.embed.si([text]).set(queue=QUEUE)


#: Everything that Celery has a producer write into a message.
JOBS: dict[str, Callable[[], Any]] = {
    "plain": lambda: job("a").delay(),
    "limits, expiry and a countdown": lambda: job("a").apply_async(
        priority=9, countdown=1, expires=60, time_limit=5, soft_time_limit=2.5, ignore_result=True
    ),
    "callbacks": lambda: job("a").apply_async(link=job("b"), link_error=job("c")),
    "chain": lambda: chain(job("a"), job("b"), job("c")).delay(),
    "chord": lambda: chord([job("a"), job("b")], job("c")).delay(),
    "group": lambda: group(job("a"), job("b")).delay(),
    "stamps": lambda: job("a").apply_async(stamped_headers=["who"], who=["me"], shadow="a name"),
}


@pytest.mark.parametrize("send", JOBS.values(), ids=JOBS)
def test_what_producers_send_is_of_the_right_shape(send: Callable[[], Any], server: str) -> None:
    send()
    with redis.Redis.from_url(server) as client:
        keys = [f"{QUEUE}{step}" for step in ("", ":3", ":6", ":9")]
        messages = [json.loads(raw) for key in keys for raw in client.lrange(key, 0, -1)]
        client.delete(*keys)
    assert messages
    for message in messages:
        check_shape(message["headers"], unpack(base64.b64decode(message["body"])), message["properties"])


def test_what_other_languages_leave_out_is_not_missed() -> None:
    check_shape({"task": "tasks.embed", "id": "job"}, [[["a text"]], {}, None], {})


@pytest.mark.parametrize(
    ("name", "value"),
    [("group", 10**400), ("retries", -1), ("retries", 2**63), ("timelimit", 5), ("timelimit", ["x", None]),
     ("eta", 1.5), ("ignore_result", [[]]), ("stamps", "x"), ("stamped_headers", [1])],
)  # fmt: skip
def test_a_header_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(Misshapen, match=f"header {name} has a wrong type"):
        check_shape({"id": "job", name: value}, BODY, {})


@pytest.mark.parametrize("job_id", [None, "", 7, ["job"]])
def test_an_id_that_is_no_text_is_refused(job_id: Any) -> None:
    with pytest.raises(Misshapen, match="header id"):
        check_shape({"id": job_id}, BODY, {})


@pytest.mark.parametrize("priority", [{}, "high", -1, 256, float("nan")])
def test_a_priority_that_is_no_small_number_is_refused(priority: Any) -> None:
    with pytest.raises(Misshapen, match="property priority"):
        check_shape({"id": "job"}, BODY, {"priority": priority})


@pytest.mark.parametrize(
    "body",
    [
        "abc",
        7,
        None,
        [],
        [[], {}],
        [[], {}, {}, {}],
        [{}, [], {}],
        [None] * 3,
        [[], {7: 1}, {}],
        [[], {}, "x"],
        [[], {}, {None: 1}],
        [[], {}, {"id": "x"}],
    ],
)
def test_a_body_of_another_shape_is_refused(body: Any) -> None:
    with pytest.raises(Misshapen):
        check_shape({"id": "job"}, body, {})


@pytest.mark.parametrize("name", ["callbacks", "errbacks", "chain", "chord"])
@pytest.mark.parametrize("value", [5, "x", [5], [{}], {"task": 5}])
def test_what_follows_a_job_must_be_jobs(name: str, value: Any) -> None:
    with pytest.raises(Misshapen, match=f"field {name}"):
        check_shape({"id": "job"}, [[], {}, {name: value}], {})


def test_a_refusal_never_says_what_was_in_the_message() -> None:
    with pytest.raises(Misshapen) as refused:
        check_shape({"id": "job", "group": ["a secret"]}, BODY, {})
    assert "secret" not in str(refused.value)


@pytest.mark.usefixtures("worker")
def test_a_misshapen_job_is_answered_and_not_held_for_ever(server: str) -> None:
    with redis.Redis.from_url(server) as client:
        jobs = [
            put(client, pack([[["a text"]], None, {}])),
            put(client, pack("abc")),
            put(client, pack(BODY), group=10**400),
            put(client, pack(BODY), timelimit="soon"),
        ]
        for job in jobs:
            with pytest.raises(InvalidInput, match=r"^the message's "):
                job.get(timeout=30)
        wait_until(lambda: not any(client.hexists("unacked", job.id) for job in jobs))
