"""A thread that tells the server how fast this worker is; `tasks.speeds` says what for, and where it is kept."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import redis

from embedq.core.engine import Engine
from embedq.tasks.speeds import INTERVAL_S, Speed, Speeds
from embedq.workers.monitoring.health import READY, Health
from embedq.workers.monitoring.job_counters import Counts
from embedq.workers.queues import queues_of

log = logging.getLogger(__name__)


class Reports:
    """Tells while the worker takes jobs and gets on; a context manager that takes the report back."""

    def __init__(self, speeds: Speeds, worker: str, health: Health, models: Callable[[], dict[str, Speed]]) -> None:
        self._speeds = speeds
        self._worker = worker
        self._health = health
        self._models = models
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def __enter__(self) -> Reports:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        was_told = self._try(self._speeds.tidy)
        while not self._is_over.wait(INTERVAL_S if was_told else INTERVAL_S / 5):
            if self._health.state == READY and self._health.live()[0]:
                was_told = self._try(lambda: self._speeds.tell(self._worker, self._models()))
            elif was_told:
                self._try(lambda: self._speeds.leave(self._worker))  # it takes no jobs: nobody is to count on it
                was_told = False
        self._try(lambda: self._speeds.leave(self._worker))

    def _try(self, do: Callable[[], None]) -> bool:
        try:
            do()
        except (redis.RedisError, OSError) as error:  # the exporter counts this worker out, and in again
            log.warning("speed not reported", extra={"action": "report_failed", "error": type(error).__name__})
            return False
        return True


def speeds_of(engine: Engine, counts: Counts) -> dict[str, Speed]:
    """What this worker measured, by model."""
    sizes, queues = counts.tokens_per_job(), queues_of(engine)
    speeds = {}
    for alias, passes in engine.meter.passes.items():
        known = {queue: sizes[queue] for queue, of in queues.items() if of == alias and queue in sizes}
        speeds[alias] = Speed(round(passes.tokens_per_second, 1), known)
    return speeds
