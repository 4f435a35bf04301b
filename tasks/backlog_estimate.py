"""Estimates how many tokens wait for a model, and how fast a worker computes them. Pure; for launcher and exporter alike.

Jobs in queues become tokens by the mean of those answered from the same queue, and tokens become seconds by the speed
that workers measure: a few jobs for a slow reranker and many for a fast embedder then add up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from statistics import fmean
from typing import NamedTuple

from embedq.tasks.speeds import Speed


class Estimate(NamedTuple):
    """The backlog of one model."""

    num_tokens: float
    #: Of one worker; 0 if no speed is known.
    tokens_per_second: float

    def seconds(self, num_workers: int = 1) -> float:
        """Seconds in which so many workers compute what waits. The speed must be known, unless nothing waits."""
        return self.num_tokens / (self.tokens_per_second * num_workers) if self.num_tokens else 0.0


def estimate(
    queued: Mapping[str, int], workers: Collection[Speed], latest: Speed, unmeasured: Speed | None = None
) -> Estimate | None:
    """The backlog of one model with `queued` jobs by queue; None if jobs wait and their size is unknown.

    `workers` are the measurements of those that serve the model, `latest` that of whoever measured it last, there or
    not. `unmeasured` is assumed where neither says anything.
    """
    unmeasured = unmeasured or Speed()
    num_tokens = 0.0
    for queue, num_jobs in queued.items():
        size = _job_size(queue, workers, latest, unmeasured)
        if num_jobs and not size:
            return None
        num_tokens += num_jobs * size
    speed = mean_speed(workers) or latest.tokens_per_second or unmeasured.tokens_per_second
    return Estimate(num_tokens, speed)


def mean_speed(workers: Iterable[Speed]) -> float:
    """Tokens per second of a worker, over those that have measured it; 0 if none has."""
    measured = [one.tokens_per_second for one in workers if one.tokens_per_second > 0]
    return fmean(measured) if measured else 0.0


def _job_size(queue: str, workers: Iterable[Speed], latest: Speed, unmeasured: Speed) -> float:
    """Mean tokens of a queue's jobs: as the workers see them, else as last seen there or in the model's other queues."""
    seen = [one.tokens_per_job[queue] for one in workers if queue in one.tokens_per_job]
    if seen:
        return fmean(seen)
    known = latest.tokens_per_job or unmeasured.tokens_per_job
    return known.get(queue, fmean(known.values())) if known else 0.0
