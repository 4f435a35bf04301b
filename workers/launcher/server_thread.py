"""A thread that repeats a step on a connection to the server, and reconnects when the connection is lost.

Subclasses define the step, and what an outage means.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from embedq import tasks
from embedq.core.guarded_thread import GuardedThread

log = logging.getLogger(__name__)

#: Errors of a server that is away.
BROKEN = (redis.RedisError, OperationalError, OSError)

#: Seconds between two attempts to connect.
_PAUSE_S = 1.0


class Connected(GuardedThread):
    """Calls `_begin` on each new connection, then `_step` repeatedly, until it is closed."""

    def __init__(self, name: str, app: Celery = tasks.app) -> None:
        super().__init__(name, self._serve, max_restarts=None)
        self._app = app
        self._is_over = threading.Event()

    def close(self) -> None:
        """End after the present step."""
        self._is_over.set()

    def _serve(self) -> None:
        while not self._is_over.is_set():
            try:
                with self._app.connection_for_read() as connection:
                    self._begin(connection)
                    while not self._is_over.is_set():
                        self._step(connection)
            except BROKEN as error:
                log.debug("%s: the server is away: %s", self.name, type(error).__name__)
                self._lost()
                self._is_over.wait(_PAUSE_S)

    def _begin(self, connection: Any) -> None:
        """Called once for each connection. An error of `BROKEN` here or in a step ends that connection."""

    def _step(self, connection: Any) -> None:
        """Called repeatedly; waits by itself, on `_is_over` if it can."""
        raise NotImplementedError

    def _lost(self) -> None:
        """Called when the connection is lost or cannot be made."""
