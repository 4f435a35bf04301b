"""A thread of the launcher's that lives through outages of the server."""

from __future__ import annotations

import queue
from typing import Any

from celery import Celery

from embedq.workers.launcher.server_thread import Connected
from tests.checkpoints import PATIENCE_S
from tests.own_server import OwnServer


class Asking(Connected):
    """Asks the server for a PING in each step, and puts what happens into a queue."""

    def __init__(self, app: Celery) -> None:
        super().__init__("asking", app)
        self.told: queue.SimpleQueue[str] = queue.SimpleQueue()

    def _begin(self, connection: Any) -> None:
        self._channel = connection.channel()
        self.told.put("begin")

    def _step(self, connection: Any) -> None:
        self._channel.client.ping()
        self.told.put("step")
        self._is_over.wait(0.01)

    def _lost(self) -> None:
        self.told.put("lost")

    def until(self, what: str) -> list[str]:
        """What happened up to the next `what`."""
        seen: list[str] = []
        while not seen or seen[-1] != what:
            seen.append(self.told.get(timeout=PATIENCE_S))
        return seen


def test_it_reports_an_outage_and_begins_anew_once_the_server_is_back(app: Celery, own: OwnServer) -> None:
    thread = Asking(app)
    thread.start()
    try:
        assert thread.until("step") == ["begin", "step"]
        own.kill()
        try:
            assert set(thread.until("lost")) <= {"step", "lost"}
        finally:
            own.start()
        assert set(thread.until("begin")) <= {"lost", "begin"}
        assert thread.until("step") == ["step"]
    finally:
        thread.close()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_it_ends_while_the_server_is_away(own: OwnServer, app: Celery) -> None:
    own.kill()
    try:
        thread = Asking(app)
        thread.start()
        thread.until("lost")
        thread.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    finally:
        own.start()
