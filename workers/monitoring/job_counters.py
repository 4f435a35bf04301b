"""Counts the jobs of one worker: `Counts` for heartbeats and autoscaling, `JobCounts` for metrics.

The event loop and the answers thread write, each its own fields; the heartbeat and each scrape read. A job costs some
microseconds here (`python -m tests.bench metrics`). Labels come from our own models and tasks, never from a message:
anybody may write those, and each new label is a new time series in Prometheus.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from itertools import product
from typing import Any, NamedTuple, Protocol

from celery.exceptions import Retry
from celery.signals import task_revoked

from embedq.core.batching.batch_stats import Histogram
from embedq.core.batching.decayed_mean import DecayedMean
from embedq.core.batching.job import Job
from embedq.core.engine import Engine
from embedq.tasks.metrics import OUTCOMES, STAGES
from embedq.workers.parts.part_run import PartRun
from embedq.workers.parts.part_threads import PartThreads

#: Jobs of a queue after which one counts half in the mean size of a job.
_HALF_LIFE_JOBS = 69.0

#: Names of queues come with messages, and anybody may write those: sizes are kept for at most so many.
_MAX_QUEUES = 200

#: Upper bounds of the stages' histograms: a one-text job takes some milliseconds, a bulk job minutes.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

#: What a job may be for the engine: the values of `kind`.
KINDS = ("embed", "rerank", "part")

#: The model of a job that never came to one: its call was wrong, or it was revoked before it was opened.
UNKNOWN = "unknown"


class Counts:
    """Counts of one worker since its start, for autoscaling and heartbeats."""

    def __init__(self) -> None:
        #: Jobs answered, failures included.
        self.num_jobs = 0
        #: Turns of the event loop: each asks once for room.
        self.num_turns = 0
        #: Per queue, the tokens of an answered job.
        self._sizes: dict[str, DecayedMean] = {}
        #: Per queue, the tokens of a text and of a character, over the jobs whose senders say how many they hold.
        self._per_text: dict[str, DecayedMean] = {}
        self._per_character: dict[str, DecayedMean] = {}
        self._busy_s = 0.0
        self._busy_since_s: float | None = None

    def holds(self, is_holding: bool) -> None:
        """Record that the worker holds jobs, or none any more. One thread at a time may call it."""
        now_s = time.monotonic()
        if is_holding and self._busy_since_s is None:
            self._busy_since_s = now_s
        elif not is_holding and self._busy_since_s is not None:
            self._busy_s += now_s - self._busy_since_s
            self._busy_since_s = None

    @property
    def busy_s(self) -> float:
        """Seconds in which there was a job to work on."""
        since_s = self._busy_since_s
        return self._busy_s + (time.monotonic() - since_s if since_s is not None else 0.0)

    def answered(self, queue: str, num_tokens: int, amount: tuple[int, int] | None = None) -> None:
        """Record that a job of `queue` was answered. Only the answers thread may call it.

        `amount` is how many texts and characters its sender says it holds.
        """
        self.num_jobs += 1
        if num_tokens and (queue in self._sizes or len(self._sizes) < _MAX_QUEUES):
            if queue not in self._sizes:
                for means in (self._sizes, self._per_text, self._per_character):
                    means[queue] = DecayedMean(_HALF_LIFE_JOBS)
            self._sizes[queue].add(num_tokens)
            if amount and all(amount):
                self._per_text[queue].add(num_tokens, weight=amount[0])
                self._per_character[queue].add(num_tokens, weight=amount[1])

    def tokens_per_job(self) -> dict[str, float]:
        """By queue, the mean tokens of its latest jobs."""
        return _means(self._sizes, 1)

    def tokens_per_text(self) -> dict[str, float]:
        """By queue, the mean tokens of a text or passage of its latest jobs."""
        return _means(self._per_text, 2)

    def tokens_per_character(self) -> dict[str, float]:
        """By queue, the mean tokens of a character of its latest jobs."""
        return _means(self._per_character, 4)


def _means(by_queue: Mapping[str, DecayedMean], digits: int) -> dict[str, float]:
    return {queue: round(one.mean, digits) for queue, one in tuple(by_queue.items()) if one.weight}


class Times(NamedTuple):
    """The times of one job, and its labels. Seconds; `ended_s` is 0 if none of it was computed."""

    model: str
    kind: str
    waited_s: float
    encoded_s: float
    computed_s: float
    ended_s: float
    num_tokens: int


class JobCounts:
    """Counts of the jobs of one worker since its start, for metrics."""

    def __init__(self, models: Collection[str]) -> None:
        #: Ended jobs by (model, kind, outcome). From the start also those of which there is none: Prometheus sees a
        #: count that rises from 0, and not one that begins at 1.
        self.outcomes = dict.fromkeys(product((*models, UNKNOWN), KINDS, OUTCOMES), 0)
        self.num_ended = 0
        #: By model, of jobs that were computed: seconds in each of `STAGES`.
        self.stages = {model: tuple(Histogram(SECONDS) for _ in STAGES) for model in models}
        self._lock = threading.Lock()
        task_revoked.connect(self._revoked, weak=True)

    def stored(self, times: Times, outcome: str, then: Callable[[], None]) -> None:
        """Count a job whose result is stored, then call `then`."""
        self._add(times, outcome)
        then()

    def _add(self, times: Times, outcome: str) -> None:
        model, kind, waited_s, encoded_s, computed_s, ended_s, _ = times
        self.count(model, kind, outcome)
        if not ended_s:
            return  # none of it was computed
        waited, encoded, computed, stored = self.stages[model]
        waited.add(waited_s)
        encoded.add(encoded_s)
        computed.add(computed_s)
        stored.add(time.monotonic() - ended_s)

    def count(self, model: str, kind: str, outcome: str) -> None:
        """Count a job that ended with this outcome. Any thread may call it."""
        key = model, kind, outcome
        with self._lock:  # the answers thread counts, and the event loop, where a job is revoked before the pool has it
            self.num_ended += 1
            self.outcomes[key] = self.outcomes.get(key, 0) + 1

    def _revoked(self, sender: Any = None, **_: Any) -> None:
        """Count a revoked job. Celery signals it wherever one is dropped: before the pool had it, or by the pool."""
        self.count(UNKNOWN, kind_of(sender), "revoked")


class JobsOfWorker(Protocol):
    """The jobs that a worker holds, as far as monitoring reads them; `len` is their number."""

    engine: Engine
    counts: Counts
    job_counts: JobCounts
    parts: PartThreads

    @property
    def is_alive(self) -> bool: ...

    def __len__(self) -> int: ...


def times_of(job: Job | PartRun | None, task: Any) -> Times:
    """The times of a job that is being answered; zeros if its call was never opened."""
    kind = kind_of(task)
    if job is None or not job.is_opened or job.call is None:
        return Times(UNKNOWN, kind, 0.0, 0.0, 0.0, 0.0, 0)
    return Times(
        job.call.model.spec.alias, kind, job.waited_s, job.encoded_s, job.computed_s, job.ended_s, job.num_tokens
    )


def outcome_of(traced: Any) -> str:
    """The outcome, one of `OUTCOMES`, of what Celery's tracer returned: (failed, result or exception, seconds)."""
    has_failed, result, _ = traced
    if not has_failed:
        return "succeeded"
    error = getattr(result, "exception", None)
    return "retried" if isinstance(getattr(error, "exc", error), Retry) or isinstance(error, Retry) else "failed"


def kind_of(task: Any) -> str:
    """One of `KINDS`; "other" for tasks that are not the engine's."""
    kind = str(getattr(task, "name", "")).removeprefix("tasks.")
    kind = "part" if kind.endswith("_part") else kind
    return kind if kind in KINDS else "other"
