"""A thread that reports the worker's state each second to its launcher, and keeps the last report for whoever asks.

Reads counters that others write and waits for nothing, so that it reports whatever else in the process hangs. It also
measures the speed of each model, from the same counters.
"""

from __future__ import annotations

import logging
import os
import threading
import time

from embedq.core.batching.device_memory import memory_bytes
from embedq.core.guarded_thread import GuardedThread
from embedq.tasks.speeds import Speed
from embedq.workers.context import DRAINING, READY, Lifecycle
from embedq.workers.heartbeat_line import INTERVAL_S, VARIABLE, Beat
from embedq.workers.monitoring.idle_memory import IdleMemory
from embedq.workers.monitoring.job_counters import Counts, JobsOfWorker
from embedq.workers.monitoring.rates import PassCounts, Rates
from embedq.workers.queues import queues_of

log = logging.getLogger(__name__)


class Heart:
    """Reports until the process ends: loading until `serves` is called."""

    def __init__(self, lifecycle: Lifecycle, descriptor: int | None) -> None:
        """`descriptor` is the launcher's pipe; None without a launcher."""
        self.last = Beat()
        self._worker = ""
        self._lifecycle = lifecycle
        self._descriptor = descriptor
        #: The rest of a line of which the pipe had room for a part.
        self._unsent = b""
        if descriptor is not None:
            # A launcher that is stopped, or busy for minutes, reads nothing: then the pipe fills up, and a write would
            # wait for it, and with it the speeds and whatever else asks for the last heartbeat.
            os.set_blocking(descriptor, False)
        self._jobs: JobsOfWorker | None = None
        self._rates = Rates()
        self._memory = IdleMemory()
        self._is_news = threading.Event()

    def start(self) -> None:
        """Begin to report."""
        GuardedThread("heartbeat", self._run, max_restarts=None).start()

    def serves(self, worker: str, jobs: JobsOfWorker) -> None:
        """The worker takes jobs from now on; this is reported at once."""
        self._worker, self._jobs = worker, jobs
        self._is_news.set()

    def _run(self) -> None:
        while True:
            self._is_news.clear()
            try:
                self.last = self._beat()
                if self._jobs is not None:
                    self._memory.observe(len(self._jobs))
            except Exception:  # of a broken device's driver, say; a worker that is silent would be killed for it
                log.exception("the worker's state cannot be reported", extra={"action": "heartbeat_failed"})
            self._send(self.last.line())
            self._is_news.wait(INTERVAL_S)

    def _send(self, line: bytes) -> None:
        """Write a line to the launcher's pipe; while that is full, heartbeats are dropped, and none is cut in two."""
        if self._descriptor is None:
            return
        try:
            if self._unsent:
                self._unsent = self._unsent[os.write(self._descriptor, self._unsent) :]
            if not self._unsent:
                self._unsent = line[os.write(self._descriptor, line) :]
        except BlockingIOError:
            pass
        except OSError:  # the launcher is gone, and the kernel has signalled this process to drain
            self._descriptor = None

    def _beat(self) -> Beat:
        jobs = self._jobs
        if jobs is None:
            return Beat()
        engine, counts = jobs.engine, jobs.counts
        totals = engine.backlog.totals
        passes = {
            alias: PassCounts(of_model.seconds, of_model.num_tokens, of_model.num_loaded)
            for alias, of_model in engine.meter.passes.items()
        }
        self._rates.add(time.monotonic(), counts.busy_s, counts.num_jobs, passes)
        jobs_s, tokens_s = self._rates.per_second
        queues = queues_of(engine)
        return Beat(
            state=DRAINING if self._lifecycle.state == DRAINING else READY,
            worker=self._worker,
            model="+".join(engine.models),
            queues=queues,
            num_jobs=counts.num_jobs,
            num_batches=totals.num_batches,
            num_turns=counts.num_turns,
            num_held=len(jobs),
            waiting=engine.waiting_by_model(),
            jobs_s=round(jobs_s, 2),
            tokens_s=round(tokens_s, 1),
            busy=round(self._rates.busy, 3),
            models=_measured(queues, self._rates.speeds, counts),
            memory_bytes=sum(memory_bytes(device)[0] for device in {model.device for model in engine.models.values()}),
        )


def _measured(queues: dict[str, str], speeds: dict[str, float], counts: Counts) -> dict[str, Speed]:
    """Returns what was measured of each model that has queues: its speed, and the sizes of jobs and texts by queue."""
    sizes = counts.tokens_per_job(), counts.tokens_per_text(), counts.tokens_per_character()
    return {
        model: Speed(
            round(speeds.get(model, 0.0), 1),
            *({queue: one[queue] for queue, of in queues.items() if of == model and queue in one} for one in sizes),
        )
        for model in dict.fromkeys(queues.values())
    }


def launcher_pipe() -> int | None:
    """The pipe that this process's launcher made for its heartbeats; None without a launcher."""
    given = os.environ.get(VARIABLE, "")
    return int(given) if given.isdecimal() else None
