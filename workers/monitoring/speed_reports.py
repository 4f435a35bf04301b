"""A thread that publishes how fast this worker is (`tasks.speeds`), and renews what it has announced (`tasks.models`).

A server that was emptied knows this worker's models again within seconds; without, producers accepted any name, or
refused the right ones, until a worker was restarted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import redis

from embedq.core.errors import InvalidSettings
from embedq.core.guarded_thread import GuardedThread
from embedq.tasks.speeds import BUSY_INTERVAL_S, INTERVAL_S, Load, Speed, Speeds
from embedq.workers.monitoring.health import Health

log = logging.getLogger(__name__)


class SpeedReports:
    """Publishes while the worker takes jobs and makes progress; a context manager that withdraws the report."""

    def __init__(
        self,
        speeds: Speeds,
        worker: str,
        health: Health,
        measured: Callable[[], dict[str, Speed]],
        renew: Callable[[], None],
        load: Callable[[], Load] = Load,
    ) -> None:
        self._renew, self._load = renew, load
        self._speeds = speeds
        self._worker = worker
        self._health = health
        self._measured = measured
        self._is_over = threading.Event()
        self._thread = GuardedThread("reports", self._run, max_restarts=None)

    def __enter__(self) -> SpeedReports:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        is_published = self._try(self._speeds.tidy)
        told, next_s = Load(), 0.0
        while not self._is_over.wait(BUSY_INTERVAL_S):
            now_s, load = time.monotonic(), self._load()
            is_busy = bool(load.batch_tokens or told.batch_tokens)
            if is_published and not is_busy and now_s < next_s:
                continue
            models = self._measured()
            is_present = self._health.ready()[0] and self._health.live()[0]
            if is_present and now_s >= next_s:
                next_s = now_s + INTERVAL_S - BUSY_INTERVAL_S / 2
                self._try(self._renew)
            if models and is_present:
                told, is_published = load, self._try(partial(self._speeds.publish, self._worker, models, load))
            elif is_published:
                self._try(lambda: self._speeds.withdraw(self._worker))  # it takes no jobs: nobody should count on it
                is_published = False
        self._try(lambda: self._speeds.withdraw(self._worker))

    def _try(self, do: Callable[[], None]) -> bool:
        try:
            do()
        except (redis.RedisError, OSError) as error:  # the exporter counts this worker as gone until the next report
            log.warning("speed not published", extra={"action": "report_failed", "error": type(error).__name__})
            return False
        except InvalidSettings as error:  # another worker has announced what contradicts ours since the server lost it
            log.error("models not announced again: %s", error, extra={"action": "announcement_refused"})
            return False
        return True
