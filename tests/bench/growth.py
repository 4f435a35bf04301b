"""`python -m tests.bench growth`: memory over many jobs, of one worker, of its producer, and of the server.

One-text jobs through a worker whose model costs nothing, from producers of every habit: that wait for
results and forget them, that leave results to expire, that never ask, that wait in asyncio. After a
warm-up the memory of both processes is told every so many jobs, and its slope; at the end the server's keys.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedq import tasks
from tests.bench import draining, report, usage
from tests.bench.arguments import whole
from tests.bench.draining import OURS, Subject
from tests.bench.report import Figure
from tests.bench.running import server

#: Jobs sent at once.
_WRITE = 500

#: Seconds a result is kept here, so that it is seen to expire.
_EXPIRES_S = 5

#: Between two looks whether the last results have expired, and seconds after which they should have.
_LOOK_S, _TIMEOUT_S = 0.05, 120.0

#: Of a job, the most that a process may keep; far below its message (1 KB) or its result (1.7 KB).
_MAX_BYTES_PER_JOB = 50.0

#: Keys that are told together, by how they begin. kombu's are one for each queue that was ever consumed.
_KINDS = {"celery-task-meta-": "results", "_kombu.": "kombu's lists of queues"}

_MIB = 1024**2

#: What a producer does with the results of its jobs.
Habit = Callable[[list[Any]], None]


@dataclass(frozen=True)
class Sample:
    """Memory after so many jobs."""

    num_jobs: int
    worker_bytes: int
    producer_bytes: int


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    given = _parser().parse_args(arguments)
    num_jobs, num_samples = (given.jobs or 6_000, 3) if given.quick else (given.jobs or 200_000, 10)
    figures = measure(num_jobs, max(_WRITE, num_jobs // num_samples))
    report.show(f"memory over {num_jobs:,} one-text jobs", figures)
    if given.json:
        report.write(given.json, {"command": "growth", "arguments": arguments, "num_jobs": num_jobs}, figures)
    return 0


def measure(num_jobs: int, num_each: int) -> list[Figure]:
    """All figures: memory every `num_each` jobs, its slopes, and the keys left at once and once results have expired."""
    os.environ["EMBEDQ_RESULT_EXPIRES_S"] = str(_EXPIRES_S)  # the worker's; keys are the producer's to forget
    with server() as url, draining.running(OURS, url, 0) as worker:
        worker.wait_until_ready()
        habits = itertools.cycle((_wait_and_forget, _wait, _never_ask, _wait_in_asyncio))
        _run(worker, num_each, habits)  # the warm-up: what is allocated once is allocated now
        samples = [_sample(worker, 0)]
        for done in range(num_each, num_jobs + 1, num_each):
            _run(worker, num_each, habits)
            samples.append(_sample(worker, done))
        at_once = _keys(worker)
        _wait_until_expired(worker)
        return _figures(samples, at_once, _keys(worker))


def _run(worker: Subject, num_jobs: int, habits: Iterator[Habit]) -> None:
    """Jobs of all producers in turn, each lot answered before the next is sent."""
    for _ in range(0, num_jobs, _WRITE):
        jobs = tasks.embed_many([draining.next_text()] for _ in range(_WRITE))
        next(habits)(jobs)
        _wait_until_idle(worker)


def _wait_and_forget(jobs: list[Any]) -> None:
    for job in jobs:
        job.get(timeout=_TIMEOUT_S)
        job.forget()


def _wait(jobs: list[Any]) -> None:
    for job in jobs:
        job.get(timeout=_TIMEOUT_S)


def _never_ask(jobs: list[Any]) -> None:
    """They are dropped, as their ids are where a result is read by another program."""


def _wait_in_asyncio(jobs: list[Any]) -> None:
    async def wait() -> None:
        await asyncio.gather(*(tasks.aget(job, timeout=_TIMEOUT_S) for job in jobs))

    asyncio.run(wait())


def _wait_until_idle(worker: Subject) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while worker.client.llen("embed") or worker.client.hlen("unacked"):
        assert time.monotonic() < deadline_s, "the worker has stopped"
        time.sleep(_LOOK_S / 10)


def _wait_until_expired(worker: Subject) -> None:
    deadline_s = time.monotonic() + _TIMEOUT_S
    while any(worker.client.scan_iter("celery-task-meta-*", count=1_000)) and time.monotonic() < deadline_s:
        time.sleep(_LOOK_S)


def _sample(worker: Subject, num_jobs: int) -> Sample:
    gc.collect()
    return Sample(num_jobs, usage.rss_bytes(worker.running.process.pid), usage.rss_bytes(os.getpid()))


def _keys(worker: Subject) -> dict[str, int]:
    """How many keys there are of each kind, and of all others the number of their members."""
    found: Counter[str] = Counter()
    sizes: dict[bytes, Callable[[Any], Any]] = {
        b"hash": worker.client.hlen,
        b"set": worker.client.scard,
        b"zset": worker.client.zcard,
        b"list": worker.client.llen,
        b"stream": worker.client.xlen,
        b"string": lambda _: 1,
    }
    for key in worker.client.scan_iter(count=1_000):
        name = key.decode()
        kind = next((told for prefix, told in _KINDS.items() if name.startswith(prefix)), None)
        found[kind or name] += 1 if kind else int(sizes[worker.client.type(key)](key))
    return dict(found)


def _figures(samples: list[Sample], at_once: dict[str, int], at_last: dict[str, int]) -> list[Figure]:
    figures = []
    for sample in samples:
        told = f"after {sample.num_jobs:,} jobs"
        for name, value in (("worker", sample.worker_bytes), ("producer", sample.producer_bytes)):
            figures.append(Figure(f"{name}_mib_{sample.num_jobs}", f"{told}: {name}", value / _MIB, "MiB"))
    for name in ("worker", "producer"):
        slope = _slope(
            [sample.num_jobs for sample in samples], [getattr(sample, f"{name}_bytes") for sample in samples]
        )
        what = f"{name}: growth, by least squares"
        figures.append(Figure(f"{name}_bytes_per_job", what, slope, "bytes/job", _MAX_BYTES_PER_JOB, is_limit=True))
    for when, keys in (("at once", at_once), ("in the end", at_last)):
        for name, number in sorted(keys.items()):
            figures.append(Figure(f"keys {when} {name}", f"keys {when}: {name}", number, ""))
    return figures


def _slope(numbers: list[int], values: list[int]) -> float:
    return float(np.polyfit(numbers, values, 1)[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench growth", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few jobs: shows that it runs")
    parser.add_argument("--jobs", type=whole(), help="jobs after the warm-up (200000)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser
