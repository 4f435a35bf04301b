"""How events travel: as many in one message as there are, instead of Celery's two dozen."""

from __future__ import annotations

from typing import Any

from celery import bootsteps

#: Events of one message. Each message is a round trip: at 24, Celery's own limit, a worker spent a tenth of
#: what a one-text job costs it on telling of it (docs/measurements.md).
_MAX_EVENTS = 1_000


class EventsInBulk(bootsteps.StartStopStep):
    """Consumer step: raises the limit of Celery's dispatcher, which sends what there is at each turn of the loop."""

    requires = ("celery.worker.consumer.events:Events",)

    def start(self, consumer: Any) -> None:
        """Called again after each reconnect, with a new dispatcher."""
        if consumer.event_dispatcher:
            consumer.event_dispatcher.buffer_limit = _MAX_EVENTS
