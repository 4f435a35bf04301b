"""A worker's heart: a thread that says each second how the worker is, to its launcher and to whoever asks.

Reads counters that others write and waits for nothing, so that it beats whatever else in the process hangs. Without
a launcher it only keeps the last beat, for remote control.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

from celery.signals import worker_ready

from embedq.core.batching.device_memory import memory_bytes
from embedq.workers.heartbeat_line import DRAINING, INTERVAL_S, READY, VARIABLE, Beat
from embedq.workers.monitoring import health as states
from embedq.workers.monitoring.health import health
from embedq.workers.monitoring.rates import Rates
from embedq.workers.queues import queues_of

log = logging.getLogger(__name__)


class Heart:
    """Beats until the process ends."""

    def __init__(self, descriptor: int | None) -> None:
        self.last = Beat()
        self._descriptor = descriptor
        self._worker = ""
        self._pool: Any = None
        self._rates = Rates()
        self._is_news = threading.Event()

    def start(self) -> None:
        """Begin to beat, and listen for what changes the worker's state."""
        worker_ready.connect(self._ready, weak=False)
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def _ready(self, sender: Any = None, **_: Any) -> None:
        self._worker, self._pool = sender.hostname, sender.pool
        self._is_news.set()

    def _run(self) -> None:
        while True:
            self._is_news.clear()
            try:
                self.last = self._beat()
            except Exception:  # of a broken device's driver, say; a worker whose heart stops would be killed for it
                log.exception("the state of this worker cannot be told", extra={"action": "heartbeat_failed"})
            if self._descriptor is not None:
                try:
                    os.write(self._descriptor, self.last.line())
                except OSError:  # the launcher is gone, and the kernel has told this process to drain
                    self._descriptor = None
            self._is_news.wait(INTERVAL_S)

    def _beat(self) -> Beat:
        if self._pool is None:
            return Beat()
        engine, counts = self._pool.engine, self._pool.counts
        totals = engine.backlog.totals
        passes = {alias: (of_model.seconds, of_model.num_tokens) for alias, of_model in engine.meter.passes.items()}
        self._rates.add(time.monotonic(), counts.busy_s, counts.num_jobs, passes)
        jobs_s, tokens_s = self._rates.per_second
        return Beat(
            state=DRAINING if health.state == states.DRAINING else READY,
            worker=self._worker,
            model="+".join(engine.models),
            queues=queues_of(engine),
            num_jobs=counts.num_jobs,
            num_batches=totals.num_batches,
            num_turns=counts.num_turns,
            num_held=self._pool.num_held,
            waiting=engine.waiting_by_model(),
            jobs_s=round(jobs_s, 2),
            tokens_s=round(tokens_s, 1),
            busy=round(self._rates.busy, 3),
            speeds={alias: round(speed, 1) for alias, speed in self._rates.speeds.items()},
            tokens_per_job=counts.tokens_per_job(),
            memory_bytes=sum(memory_bytes(device)[0] for device in {model.device for model in engine.models.values()}),
        )


#: The heart of this process.
heart = Heart(None)


def start() -> None:
    """Let this process's heart beat, into the pipe its launcher made if it has one."""
    given = os.environ.get(VARIABLE, "")
    heart._descriptor = int(given) if given.isdecimal() else None
    heart.start()
