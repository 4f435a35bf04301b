"""What bulk gets, and what interactive jobs pay for it, under an interactive load just above two encode threads.

`python -m tests.bench fairness` runs one engine three times: without bulk, with bulk that has no turn at the encode
threads (as before 0.2.0), and with its turn. Encoding sleeps, so that the load is the same on every machine, and the
model is a fake whose passes cost next to nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from embedq.core.batching.job import SLICE, Call, Job
from embedq.core.sequence import Tokens, Wanted
from tests.checkpoints import FakeModel
from tests.engines import running

#: Seconds that encoding takes: an interactive job, and a slice of a bulk job.
_JOB_S, _SLICE_S = 0.01, 0.05

_NUM_THREADS = 2
_LOAD = 1.02
_BULK_WAIT_S = 2.0
_NEVER_S = 1e6


class Seen(NamedTuple):
    """One run: seconds to the first encoded bulk slice (None: none was), how many were, latencies of interactive jobs."""

    first_s: float | None
    num_slices: int
    latencies_s: list[float]


def main(arguments: list[str]) -> int:
    """Print the three runs; `arguments` may name the seconds of each."""
    seconds = float(arguments[0]) if arguments else 12.0
    print(f"{_NUM_THREADS} encode threads, interactive load {_LOAD:.0%} of them, {seconds:.0f} s each")
    for name, has_bulk, wait_s in (
        ("no bulk", False, _BULK_WAIT_S),
        ("bulk without a turn", True, _NEVER_S),
        (f"bulk with a turn in {_BULK_WAIT_S:.0f} s", True, _BULK_WAIT_S),
    ):
        seen = run(seconds, has_bulk, wait_s)
        cuts = statistics.quantiles(seen.latencies_s, n=100)
        first = "never" if seen.first_s is None else f"after {seen.first_s:.2f} s"
        bulk = f"first bulk slice {first}, {seen.num_slices} slices" if has_bulk else "-"
        print(f"{name:26} interactive median {1e3 * cuts[49]:.0f} ms, p99 {1e3 * cuts[98]:.0f} ms; {bulk}")
    return 0


def run(seconds: float, has_bulk: bool, max_bulk_wait_s: float) -> Seen:
    """Offer interactive jobs at a fixed rate for so long, with one large bulk job beside them."""
    model, slices_s, ended_s = FakeModel(), list[float](), dict[int, float]()
    with running(model, encode_threads=_NUM_THREADS, max_bulk_wait_s=max_bulk_wait_s) as engine:
        begun_s = time.monotonic()
        jobs: list[Job] = []
        bulk: Job | None = None
        while (now_s := time.monotonic()) < begun_s + seconds:
            if len(jobs) == 20 and has_bulk and bulk is None:
                bulk_s = now_s
                bulk = engine.submit(_call(model, 100 * SLICE, _SLICE_S, slices_s), priority=9)
            job = engine.submit(_call(model, 1, _JOB_S, []))
            job.answer.add_done_callback(partial(_note_end, ended_s, len(jobs)))
            jobs.append(job)
            due_s = begun_s + len(jobs) * _JOB_S / (_NUM_THREADS * _LOAD)
            time.sleep(max(0.0, due_s - time.monotonic()))
        num_slices = len(slices_s)
        first_s = slices_s[0] - bulk_s if slices_s else None
        if bulk:
            bulk.answer.cancel()
        for job in jobs:
            job.answer.result()
        latencies_s = [ended_s[number] - job.submitted_s for number, job in enumerate(jobs) if number in ended_s]
    return Seen(first_s, num_slices, latencies_s)


def _note_end(ended_s: dict[int, float], number: int, _: object) -> None:
    ended_s[number] = time.monotonic()


def _call(model: FakeModel, num_rows: int, seconds: float, notes_s: list[float]) -> Callable[[], Call]:
    def encode(rows: list[int]) -> list[Tokens]:
        time.sleep(seconds)
        notes_s.append(time.monotonic())
        return [Tokens(np.array([2, row % 1000, id(notes_s) % 100_000], np.int32)) for row in rows]

    return lambda: Call(model, Wanted(frozenset({"dense"})), [*range(num_rows)], encode, lambda rows: rows)
