"""`python -m tests.bench metrics`: what counting costs each job, each batch and each scrape, by timeit.

No server and no worker: the very calls that the path of a job makes, and nothing beside them.
"""

from __future__ import annotations

import argparse
import time
import timeit
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from embedq import tasks
from embedq.core.batching.batch_stats import Meter, ModelTotals
from embedq.core.batching.job import Job
from embedq.core.sequence import Tokens
from embedq.workers.context import Lifecycle
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.monitoring.health import Health
from embedq.workers.monitoring.heartbeat import Heart
from embedq.workers.monitoring.job_counters import JobCounts, outcome_of, times_of
from embedq.workers.monitoring.metrics_server import WorkerCollector
from tests.bench import report
from tests.bench.report import Figure
from tests.checkpoints import FakeModel
from tests.engines import running
from tests.loops import job_of

#: Calls of one timing, and timings of which the best counts: what a neighbour on the machine takes is not ours.
_CALLS, _TRIES = 20_000, 7

#: What a job may cost here, in microseconds; a one-text job costs a worker about three hundred in all.
_MAX_US = 5.0


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench metrics", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    given = parser.parse_args(arguments)
    figures = measure()
    report.show("what counting costs", figures)
    if given.json:
        report.write(given.json, {"command": "metrics", "arguments": arguments}, figures)
    return 0


def measure() -> list[Figure]:
    """All figures."""
    parts = {"answered": _answered(), "on its way": _on_its_way()}
    figures = [Figure(f"job_{name}_us", f"a job, {name}", us, "µs") for name, us in parts.items()]
    figures.append(Figure("job_us", "a one-text job, in all", sum(parts.values()), "µs", _MAX_US, is_limit=True))
    figures.append(Figure("batch_us", "a batch", _batch(), "µs"))
    figures.append(Figure("scrape_us", "a scrape of one model, without HTTP", _scrape(), "µs"))
    return figures


def _us(call: Any, num_calls: int = _CALLS) -> float:
    return min(timeit.repeat(call, number=num_calls, repeat=_TRIES)) / num_calls * 1e6


def _answered() -> float:
    """What the answers thread does more for a job than before: see `EnginePool._answer`."""
    counts, job, traced = JobCounts(["fake"]), _job(), (0, "1 × 384 float32", 0.01)
    done = SimpleNamespace(done=lambda: None).done

    def with_counts() -> None:
        became = outcome_of(traced)
        counts.stored(times_of(job, tasks.embed), became, done)

    return _us(with_counts) - _us(lambda: done())


def _on_its_way() -> float:
    """Times and tokens noted between submission and the last row: four looks at the clock and some additions."""
    tokens = [Tokens(np.zeros(12, np.int32))]
    job = _job()

    def note() -> None:
        begun_s = time.monotonic()
        job.submitted_s, job.started_s, job.ended_s = time.monotonic(), 0.0, 0.0
        job.waited_s, job.encoded_s, job._batch_size = 0.0, 0.0, 0
        job.num_tokens += sum(len(one.ids) for one in tokens)
        job.encoded_s += time.monotonic() - begun_s
        job.start(begun_s)
        job.ended_s = begun_s
        if job._batch_size < 1:
            job._batch_size = 1

    return _us(note) - _us(job.start)


def _batch() -> float:
    meter, totals = Meter(["fake"]), ModelTotals()

    def note() -> None:
        meter.begin("fake")
        totals.add(32, 400, 512, 1024)
        meter.end("fake", 400, True)

    return _us(note)


def _scrape() -> float:
    with running(FakeModel()) as engine:
        lifecycle = Lifecycle()
        health = Health(lifecycle)
        collector = WorkerCollector(health, Heart(lifecycle, None))
        health.serves("bench", HeldJobs(engine))
        return _us(collector.collect, 200)


def _job() -> Job:
    job = job_of(FakeModel(), 1)
    job.ended_s, job.num_tokens = time.monotonic(), 12
    return job
