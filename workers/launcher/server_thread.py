"""A thread that does something on a connection to the server, and goes on with a new one when that is lost.

Knows nothing of what is done; whoever derives from it says that, and what an outage means.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from embedq import tasks

log = logging.getLogger(__name__)

#: What a server that is away looks like.
BROKEN = (redis.RedisError, OperationalError, OSError)

#: Seconds between two tries to connect.
_PAUSE_S = 1.0


class Connected(threading.Thread):
    """Begins on each new connection, and does its step again and again until closed."""

    def __init__(self, name: str, app: Celery = tasks.app) -> None:
        super().__init__(name=name, daemon=True)
        self._app = app
        self._is_over = threading.Event()

    def close(self) -> None:
        """End after the present step."""
        self._is_over.set()

    def run(self) -> None:
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
        """Called once for each connection. What it or a step raises of `BROKEN` is the end of that connection."""

    def _step(self, connection: Any) -> None:
        """What is done again and again; waits by itself, on `_is_over` where it can."""
        raise NotImplementedError

    def _lost(self) -> None:
        """The connection is gone, or there is none."""
