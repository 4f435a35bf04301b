"""Celery's events as a test sees them: every job's own, in the order in which they arrived."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from embedq import tasks

#: Seconds an event may take on a busy machine.
TIMEOUT_S = 60.0

#: Types of our own events. The first shows that the receiver hears, the last ends it: it would not
#: look at its stop flag before another event came.
_BEGIN, _END = "tests-begin", "tests-end"

#: Between two of the first kind: what is published before the server knows the subscriber is lost.
_AGAIN_S = 0.05


class Events:
    """A receiver in a thread, from entering to leaving. Knows jobs by their ids."""

    def __init__(self) -> None:
        self._seen: list[dict[str, Any]] = []
        self._changed = threading.Condition()  # reentrant: what is waited for may look at the events
        self._connection = tasks.app.connection_for_read()
        self._receiver = tasks.app.events.Receiver(self._connection, handlers={"*": self._note})
        self._thread = threading.Thread(target=self._receiver.capture, kwargs={"wakeup": False}, daemon=True)

    def __enter__(self) -> Events:
        self._thread.start()
        deadline_s = time.monotonic() + TIMEOUT_S
        with tasks.app.events.default_dispatcher() as dispatcher, self._changed:
            while not self._seen:
                assert time.monotonic() < deadline_s, "the receiver of events did not start"
                dispatcher.send(_BEGIN)
                self._changed.wait(_AGAIN_S)
        return self

    def __exit__(self, *_: object) -> None:
        with tasks.app.events.default_dispatcher() as dispatcher:
            dispatcher.send(_END)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the receiver of events did not end"
        self._connection.close()

    def of(self, job_id: str) -> list[dict[str, Any]]:
        """The events of one job so far."""
        with self._changed:
            return [event for event in self._seen if event.get("uuid") == job_id]

    def types(self, job_id: str) -> list[str]:
        """What has happened to one job so far: "received", "started", …"""
        return [event["type"].removeprefix("task-") for event in self.of(job_id)]

    def wait_for(self, kind: str, job_id: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """Wait until "received", "started", … of one job has arrived, and return it. AssertionError if not."""
        return self.wait_until(
            lambda seen: next((e for e in seen if e.get("uuid") == job_id and e["type"] == f"task-{kind}"), None),
            f"no task-{kind} of {job_id} arrived",
            timeout_s,
        )

    def wait_until(self, find: Callable[[list[dict[str, Any]]], Any], complaint: str, timeout_s: float) -> Any:
        """Wait until `find` gives something true of all events so far, and return that."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while not (found := find(self._seen)):
                left_s = deadline_s - time.monotonic()
                assert left_s > 0, f"{complaint} within {timeout_s:.0f} s"
                self._changed.wait(left_s)
            return found

    def settle(self, is_settled: Callable[[], bool], timeout_s: float) -> None:
        """Wait until `is_settled` at some event, or so long."""
        with self._changed:
            self._changed.wait_for(is_settled, timeout_s)

    def _note(self, event: dict[str, Any]) -> None:
        if event["type"] == _END:
            self._receiver.should_stop = True
            return
        with self._changed:
            self._seen.append(event)
            self._changed.notify_all()
