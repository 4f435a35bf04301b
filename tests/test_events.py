"""Events as our dispatcher sends them: what Celery's own sends, in fewer messages."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from celery.events.dispatcher import EventDispatcher

from embedq.workers.jobs.events import Dispatcher
from tests.own_server import OwnServer

#: Of an event whatever the dispatcher says of itself and of the moment.
SHARED = {"hostname", "utcoffset", "pid", "clock", "timestamp", "type"}

TIMEOUT_S = 20

#: Every kind of value that Celery's own events carry, and some that only an application's would.
FIELDS: dict[str, Any] = {
    "uuid": "7f9c",
    "args": 'quotes " and \\ and ünïcödé\n',
    "eta": None,
    "retries": 0,
    "runtime": 0.25,
    "is_bulk": True,
    "parts": [1, {"two": 3}],
}


@contextmanager
def dispatching(app: Celery, kind: type[EventDispatcher], **options: Any) -> Iterator[EventDispatcher]:
    with app.connection_for_write() as connection:
        yield kind(connection, hostname="w@h", app=app, buffer_group=["task"], **options)


def published(own: OwnServer, send: Callable[[], None]) -> list[tuple[str, list[dict[str, Any]]]]:
    """What `send` publishes, message by message: the channel, and the events in it."""
    messages: list[tuple[str, list[dict[str, Any]]]] = []
    with own.client.pubsub() as pubsub:
        pubsub.psubscribe("*celeryev*")
        assert pubsub.get_message(timeout=TIMEOUT_S)
        send()
        own.client.publish("/0.celeryev/end", "{}")
        while True:
            message = pubsub.get_message(timeout=TIMEOUT_S)
            assert message, "nothing was published"
            if message["channel"].endswith(b"/end"):
                return messages
            payload = json.loads(message["data"])
            assert (payload["content-type"], payload["content-encoding"]) == ("application/json", "utf-8")
            events = json.loads(base64.b64decode(payload["body"]))
            messages.append((message["channel"].decode(), events if isinstance(events, list) else [events]))


def test_an_event_says_what_celerys_own_would(app: Celery, own: OwnServer) -> None:
    both: list[tuple[str, list[dict[str, Any]]]] = []
    for kind in (EventDispatcher, Dispatcher):
        with dispatching(app, kind) as dispatcher:

            def send(dispatcher: EventDispatcher = dispatcher) -> None:
                dispatcher.send("task-received", **FIELDS)
                dispatcher.flush()

            both += published(own, send)
    (stock_channel, [stock]), (our_channel, [ours]) = both
    assert our_channel == stock_channel
    assert ours.keys() == stock.keys()
    assert {name: value for name, value in ours.items() if name not in SHARED} == FIELDS
    for name in ("hostname", "utcoffset", "pid", "type"):
        assert ours[name] == stock[name]
    assert ours["clock"] > stock["clock"]
    assert ours["timestamp"] >= stock["timestamp"]


def test_many_events_travel_in_one_message_and_in_order(app: Celery, own: OwnServer) -> None:
    with dispatching(app, Dispatcher, buffer_limit=1_000) as dispatcher:

        def send() -> None:
            for number in range(300):
                dispatcher.send("task-started", uuid=str(number))
            dispatcher.flush()

        ((_, seen),) = published(own, send)
    assert [event["uuid"] for event in seen] == [str(number) for number in range(300)]
    assert [event["clock"] for event in seen] == sorted({event["clock"] for event in seen})


def test_the_loop_is_asked_once_to_send_what_waits_and_again_after_that(app: Celery) -> None:
    asked: list[None] = []
    with dispatching(app, Dispatcher, on_send_buffered=lambda: asked.append(None)) as dispatcher:
        for _ in range(3):
            dispatcher.send("task-started", uuid="one")
        assert len(asked) == 1
        dispatcher.flush()
        dispatcher.send("task-started", uuid="two")
        assert len(asked) == 2


def test_events_of_other_groups_and_with_a_time_of_their_own_are_celerys(app: Celery, own: OwnServer) -> None:
    with dispatching(app, Dispatcher) as dispatcher:

        def send() -> None:
            dispatcher.send("worker-heartbeat", freq=2.0)
            dispatcher.flush()
            dispatcher.send("task-late", uuid="late", timestamp=12.5)
            dispatcher.flush()

        (_, [heartbeat]), (_, [late]) = published(own, send)
    assert (heartbeat["type"], heartbeat["freq"]) == ("worker-heartbeat", 2.0)
    assert (late["type"], late["uuid"], late["timestamp"]) == ("task-late", "late", 12.5)


def test_nothing_is_sent_while_events_are_off_or_of_groups_nobody_wants(app: Celery, own: OwnServer) -> None:
    with dispatching(app, Dispatcher, groups=["worker"]) as dispatcher:
        dispatcher.send("task-started", uuid="one")
        dispatcher.groups.clear()
        dispatcher.disable()
        dispatcher.send("task-started", uuid="two")
        before = own.count("publish")
        dispatcher.enable()
        dispatcher.flush()
        assert own.count("publish") == before


def test_events_that_could_not_be_sent_are_sent_by_the_next_dispatcher(app: Celery, own: OwnServer) -> None:
    with dispatching(app, Dispatcher, buffer_while_offline=True) as first, dispatching(app, Dispatcher) as second:
        first.send("task-started", uuid="kept")

        class _Broken:
            def publish(self, *_: Any, **__: Any) -> None:
                raise ConnectionError

        first.producer = _Broken()
        first.flush()

        def send() -> None:
            second.extend_buffer(first)
            second.flush()

        ((_, [event]),) = published(own, send)
    assert event["uuid"] == "kept"
    assert event["hostname"] == "w@h"


def test_an_event_that_cannot_be_written_is_its_senders_error(app: Celery) -> None:
    with dispatching(app, Dispatcher) as dispatcher:
        with pytest.raises(TypeError):
            dispatcher.send("task-odd", what=object())
        dispatcher.send("task-started", uuid="fine")
        assert len(dispatcher._group_buffer["task"]) == 1
