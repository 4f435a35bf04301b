"""Sends Celery's events at less cost: up to a thousand in a message instead of two dozen, serialised as they are made.

Input: the events that Celery makes of a job. Output: messages of the same meaning as those of Celery's own dispatcher.
With small jobs, events cost as much as the computation: so each event becomes JSON where it is made, and the fields
that all events of a worker share are written once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from json.encoder import encode_basestring_ascii as _text
from time import time
from typing import Any

from celery import Celery, bootsteps
from celery.utils.time import utcoffset
from kombu.utils.json import dumps

from embedq.workers.celery_private import Consumer, DispatcherBase

#: Events of one message. Each message is a round trip: at 24, Celery's own limit, a worker spent a tenth of the cost
#: of a one-text job on its events (docs/measurements.md).
_MAX_EVENTS = 1_000

#: What Celery itself puts into every event; an event that brings one of its own is left to Celery.
_SHARED = frozenset({"timestamp", "type", "hostname", "utcoffset", "pid", "clock"})

#: How values of these very types are written; `dumps` writes others.
_WRITERS: dict[type, Callable[[Any], str]] = {
    str: _text,
    type(None): lambda _: "null",
    int: int.__repr__,
    float: json.dumps,
}


class Dispatcher(DispatcherBase):
    """Celery's dispatcher with buffers that hold JSON."""

    #: Whether the event loop will call `flush`: to schedule that at each event would cost as much as the event.
    _is_awaited = False

    def send(self, type: str, *args: Any, **fields: Any) -> Any:
        """Send an event now, or buffer it until the next turn of the event loop."""
        group = type.partition("-")[0]
        if args or group not in self.buffer_group or self.serializer != "json" or not _SHARED.isdisjoint(fields):
            return super().send(type, *args, **fields)
        if not self.enabled or (self.groups and group not in self.groups):
            return None
        own = "".join([f", {_text(name)}: {_written(value)}" for name, value in fields.items()])
        shared = f'"type": {_text(type)}, "timestamp": {time()!r}, "clock": {self.clock.forward()}'
        waiting = self.buffer_of(group)
        waiting.append("{" + shared + own)  # the rest is the same for all, and follows when they are sent
        if len(waiting) >= self.buffer_limit:
            self.flush()
        elif self.on_send_buffered and not self._is_awaited:
            self._is_awaited = True
            self.on_send_buffered()
        return None

    def flush(self, *args: Any, **options: Any) -> None:
        """Send all buffered events."""
        self._is_awaited = False  # first: an event that is buffered meanwhile schedules another flush
        super().flush(*args, **options)

    def publish_events(
        self, publish: Callable[..., Any], events: Any, producer: Any, *rest: Any, **options: Any
    ) -> Any:
        """Publish a list of events as one text, which no serializer need look at again."""
        if isinstance(events, list) and producer is not None:
            events = self._joined(events)
        return publish(events, _AsItIs(producer) if isinstance(events, _Json) else producer, *rest, **options)

    def _joined(self, events: list[Any]) -> _Json:
        rest = f', "hostname": {_written(self.hostname)}, "utcoffset": {_written(utcoffset())}, "pid": {self.pid}}}'
        return _Json("[" + ", ".join([one + rest if isinstance(one, str) else dumps(one) for one in events]) + "]")


class _Json(str):
    """A message's body that is serialised already."""


class _AsItIs:
    """A producer that publishes JSON as it is."""

    def __init__(self, producer: Any) -> None:
        self._producer = producer

    def publish(self, body: str, serializer: Any = None, **options: Any) -> Any:
        return self._producer.publish(str(body), content_type="application/json", content_encoding="utf-8", **options)


class EventsInBulk(bootsteps.StartStopStep):
    """Consumer step: raises the size of the dispatcher's buffers, which are flushed at each turn of the loop."""

    requires = ("celery.worker.consumer.events:Events",)

    def start(self, consumer: Consumer) -> None:
        """Called again after each reconnect, with a new dispatcher."""
        if consumer.event_dispatcher:
            consumer.event_dispatcher.buffer_limit = _MAX_EVENTS


def use_written_events(app: Celery) -> None:
    """Make `app` send events through `Dispatcher`. To be called before its worker is built."""
    app.events.dispatcher_cls = Dispatcher


def _written(value: Any) -> str:
    """`value` in JSON."""
    write = _WRITERS.get(type(value))
    return write(value) if write else str(dumps(value))
