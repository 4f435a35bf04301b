"""A job as the worker's event loop holds it: what it shows, and what it tells the tracer."""

from __future__ import annotations

from typing import Any

import pytest
from celery.app.task import Context
from kombu.message import Message
from kombu.serialization import dumps

from embedq import tasks
from embedq.workers.jobs.request import EngineRequest


def request_of(rest: dict[str, Any] | None = None, **headers: Any) -> EngineRequest:
    """A job that was delivered before, as the strategy makes it of its message."""
    content_type, encoding, body = dumps([[["a secret"]], {}, rest or {}], "embedq")
    message = Message(
        body=body,
        headers={"task": "tasks.embed", "id": "job", "root_id": "job", "parent_id": None} | headers,
        content_type=content_type,
        content_encoding=encoding,
        accept={content_type},
        delivery_info={"exchange": "", "routing_key": "embed", "redelivered": True},
        properties={"priority": 3},
    )
    return EngineRequest(
        message, app=tasks.app, task=tasks.embed, body=message.body, headers=message.headers, decoded=False
    )


@pytest.mark.parametrize(("chord", "is_taken_for_done"), [(None, True), ({"task": "x", "args": []}, False)])
def test_a_part_of_a_chord_that_was_delivered_before_runs_again_and_others_may_be_skipped(
    chord: Any, is_taken_for_done: bool
) -> None:
    assert request_of({"chord": chord})._request_dict["delivery_info"]["redelivered"] is is_taken_for_done


def test_arguments_are_shown_as_a_summary_or_not_at_all() -> None:
    assert request_of(argsrepr="1 text, 8 characters").info()["args"] == "1 text, 8 characters"
    shown = request_of(argsrepr="(['a secret'],)", kwargsrepr="{'instruction': 'a secret'}")
    assert "secret" not in repr(shown.info())
    told = shown._request_dict
    assert "secret" not in repr([shown.argsrepr, shown.kwargsrepr, told["argsrepr"], told["kwargsrepr"]])


def test_the_tracer_gets_the_arguments_decoded_and_the_pool_its_size_and_priority() -> None:
    request = request_of()
    assert (request._body, request._content_type) == ([[["a secret"]], {}, {}], None)
    assert request.priority == 3
    assert request.num_bytes > 1000


def test_headers_of_an_applications_own_reach_the_task_and_celerys_do_not() -> None:
    own, none = request_of(tenant="a"), request_of()
    assert Context(own.request_dict).headers == {"tenant": "a"}
    assert not Context(none.request_dict).headers


def test_without_an_event_loop_a_job_is_acknowledged_at_once_and_once() -> None:
    acknowledged: list[Any] = []
    request = request_of()
    request._on_ack = lambda *args: acknowledged.append(args)
    request.acknowledge()
    request.acknowledge()
    assert len(acknowledged) == 1
