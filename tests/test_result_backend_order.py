"""What must see a result sees it: results, then chord parts and errbacks. Real server, Celery's tracer."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
import redis
from celery import Celery, chord
from celery.result import AsyncResult, allow_join_result

from tests.own_server import OwnServer
from tests.traced_jobs import CALLS, blob, run


def test_results_that_were_computed_are_stored_when_the_block_fails(app: Celery, own: OwnServer) -> None:
    def breaks_down() -> None:
        with app.backend.batch():
            run(app, "embed_one", job_id="done")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks_down()
    assert blob(own, "done")["status"] == "SUCCESS"


@pytest.mark.parametrize("many", [False, True])
def test_whatever_reads_a_result_within_a_batch_finds_it(app: Celery, own: OwnServer, many: bool) -> None:
    def reads() -> list[float]:
        with allow_join_result():
            jobs = [AsyncResult(job, app=app) for job in written]
            values = app.GroupResult("g", jobs).join_native(timeout=1) if many else [job.get(timeout=1) for job in jobs]
        return [float(value.dense[0, 0]) for value in values]

    CALLS.append(reads)
    with app.backend.batch():
        written = [run(app, "embed_one", 3.0), run(app, "embed_one", 4.0)]
        reader = run(app, "call", 0)
    assert blob(own, reader)["result"] == [3.0, 4.0]


def test_what_is_forgotten_within_a_batch_does_not_come_back(app: Celery, own: OwnServer) -> None:
    with app.backend.batch():
        app.AsyncResult(run(app, "embed_one")).forget()
    assert own.client.dbsize() == 0


def order_of_commands(own: OwnServer, act: Callable[[], Any]) -> list[str]:
    """What the server is told while `act` runs: command and first argument, in order."""
    with redis.Redis.from_url(own.url) as watching, watching.monitor() as monitor:
        act()
        own.client.echo("end")
        seen: list[Any] = []
        for entry in monitor.listen():
            if entry["command"].upper().startswith("ECHO"):
                return seen
            seen.append(" ".join(entry["command"].split(" ", 2)[:2]))
    raise AssertionError("the monitor ended")


def first(seen: list[str], *texts: str) -> int:
    return next(index for index, line in enumerate(seen) if all(text in line for text in texts))


def last(seen: list[str], *texts: str) -> int:
    return len(seen) - 1 - first(seen[::-1], *texts)


def test_chord_parts_are_returned_after_the_results_and_the_body_runs(app: Celery, own: OwnServer) -> None:
    body = chord([app.signature("embed_one", (index,)) for index in range(3)])(app.signature("sink"))
    headers = [_sent(own) for _ in range(3)]

    def work() -> None:
        with app.backend.batch():
            for message in sorted(headers, key=lambda message: message["group_index"]):
                run(app, "embed_one", message["group_index"], job_id=message["id"], **_as_request(message))

    seen = order_of_commands(own, work)
    assert last(seen, "SET celery-task-meta-") < first(seen, "SISMEMBER celery-taskset-meta-")
    sent = _sent(own)
    assert sent["id"] == body.id
    assert [part["dense"]["data"] for part in sent["args"][0]] == [np.full(384, i, "<f4").tobytes() for i in range(3)]
    assert (sent["parent_id"], sent["root_id"]) == (headers[2]["id"], headers[2]["root_id"])


def test_a_failed_chord_part_fails_the_body(app: Celery, own: OwnServer) -> None:
    body = chord([app.signature("fail"), app.signature("embed_one")])(app.signature("sink"))
    with app.backend.batch():
        for message in (_sent(own), _sent(own)):
            run(app, message["task"], job_id=message["id"], **_as_request(message))
    with pytest.raises(Exception, match="number 3 is int"):
        app.AsyncResult(body.id).get(timeout=5)


def test_an_errback_is_sent_after_the_failure_it_is_about_is_stored(app: Celery, own: OwnServer) -> None:
    def work() -> None:
        with app.backend.batch():
            run(app, "fail", errbacks=[app.signature("other.application", queue="errors")])

    seen = order_of_commands(own, work)
    assert first(seen, "SET celery-task-meta-") < first(seen, "LPUSH errors")


def _sent(own: OwnServer) -> dict[str, Any]:
    """The oldest message of the queue, taken off it: its headers, and its `args`."""
    message = json.loads(own.client.rpop("embed"))
    return message["headers"] | {"args": msgpack.unpackb(base64.b64decode(message["body"]))[0], "body": message["body"]}


def _as_request(message: dict[str, Any]) -> dict[str, Any]:
    embed = msgpack.unpackb(base64.b64decode(message["body"]))[2]
    wanted = ("group", "group_index", "root_id", "parent_id")
    return {name: message[name] for name in wanted} | {"chord": embed["chord"]}
