"""A thousand workers on one queue, simulated: each has the real scheduler, devices and the server are numbers.

In goes how many workers there are and how fast; out comes what share of their speed is used, how long interactive jobs
wait beside an endless bulk load, and how often the server would be asked. Seconds are simulated ones.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from embedq.core.batching.scheduler import Limits, Scheduler
from embedq.core.sequence import Sequence, Tokens
from tests.bench.padding import drawn

SEED = 11

#: A small accelerator or a large machine of cores: batches of 0.16 s.
TOKENS_PER_S, MAX_BATCH_TOKENS = 25_000.0, 4_096

#: Batches fetched ahead; half of what workers do, for the sake of the simulation's own time.
WINDOW_BATCHES = 8

#: Sequences of a bulk job; interactive jobs have one, of a short text.
BULK_SEQUENCES, INTERACTIVE_TOKENS = 32, 16

#: Interactive jobs that each worker's share of the load brings in a second.
INTERACTIVE_PER_S = 2.0

#: Workers differ by this much in speed, to either side.
SPREAD = 0.2

#: Simulated seconds that do not count: the windows fill.
SETTLING_S = 1.0


@dataclass(frozen=True)
class Seen:
    """What a simulation gave."""

    #: Wanted tokens computed, of those that devices without padding and pauses could have.
    use: float
    #: Sequences in a second.
    sequences_per_s: float
    #: Seconds that half and that 99 of 100 interactive jobs took, computing included.
    interactive_p50_s: float
    interactive_p99_s: float
    #: Calls for jobs, and jobs taken, in a second.
    fetches_per_s: float
    jobs_per_s: float
    #: What the slowest worker did for its speed, against the mean.
    least_share: float


@dataclass
class _Worker:
    speed: float
    scheduler: Scheduler
    batch: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0


@cache
def _tokens(length: int) -> Tokens:
    return Tokens(np.broadcast_to(np.int32(0), length))


class ManyWorkers:
    """The simulation. Deterministic for its arguments."""

    def __init__(self, num_workers: int) -> None:
        draw = np.random.default_rng(SEED)
        limits = Limits(MAX_BATCH_TOKENS, 512, overhead_tokens=MAX_BATCH_TOKENS // 32)
        speeds = TOKENS_PER_S * draw.uniform(1 - SPREAD, 1 + SPREAD, num_workers)
        self._workers = [_Worker(speed, Scheduler({"model": limits}, 0.5, 2.0)) for speed in speeds]
        self._overhead = limits.overhead_tokens
        self._lengths = drawn(200)
        self._interactive: deque[float] = deque()
        self._waits_s: list[float] = []
        self._num_fetches = self._num_jobs = 0

    def run(self, seconds: float) -> Seen:
        """Simulate so many seconds after the windows have filled."""
        draw = np.random.default_rng(SEED + 1)
        end_s, rate = SETTLING_S + seconds, INTERACTIVE_PER_S * len(self._workers)
        arrivals = deque(np.sort(draw.uniform(0.0, end_s, draw.poisson(rate * end_s))).tolist())
        starts = draw.uniform(0.0, 0.1, len(self._workers))
        events = [(start_s, number) for number, start_s in enumerate(starts.tolist())]
        heapq.heapify(events)
        while events[0][0] < end_s:
            now_s, number = heapq.heappop(events)
            while arrivals and arrivals[0] <= now_s:
                self._interactive.append(arrivals.popleft())
            took_s = self._turn(self._workers[number], now_s)
            heapq.heappush(events, (now_s + took_s, number))
        return self._seen(seconds)

    def _turn(self, worker: _Worker, now_s: float) -> float:
        """Its batch is done, its window filled again, its next batch begun; returns how long that takes."""
        counts = now_s >= SETTLING_S
        for sequence in worker.batch:
            if counts and not sequence.is_bulk:
                self._waits_s.append(now_s - sequence.identity)
        if counts:
            worker.num_tokens += sum(sequence.length for sequence in worker.batch)
        self._fetch(worker, counts)
        worker.batch = worker.scheduler.next_batch(now_s)
        padded = len(worker.batch) * max(sequence.length for sequence in worker.batch)
        took_s = (padded + self._overhead) / worker.speed
        worker.scheduler.finished("model", padded, took_s)
        return float(took_s)

    def _fetch(self, worker: _Worker, counts: bool) -> None:
        scheduler, num_jobs = worker.scheduler, 0
        # Interactive jobs are always taken, and shared by those who ask about as often.
        most = 1 + len(self._interactive) // 8
        while self._interactive and num_jobs < most:
            sent_s = self._interactive.popleft()
            scheduler.add(Sequence(_tokens(INTERACTIVE_TOKENS), "model", identity=sent_s))
            num_jobs += 1
        while scheduler.num_tokens(is_bulk=True) < WINDOW_BATCHES * MAX_BATCH_TOKENS:
            for _ in range(BULK_SEQUENCES):
                scheduler.add(Sequence(_tokens(next(self._lengths)), "model", is_bulk=True))
            num_jobs += 1
        self._num_fetches += counts and num_jobs > 0
        self._num_jobs += counts * num_jobs

    def _seen(self, seconds: float) -> Seen:
        done = np.array([worker.num_tokens for worker in self._workers])
        speeds = np.array([worker.speed for worker in self._workers])
        shares = done / speeds
        num_sequences = sum(worker.scheduler.totals.num_sequences for worker in self._workers)
        p50_s, p99_s = np.percentile(self._waits_s, [50, 99])
        return Seen(
            use=float(done.sum() / (speeds.sum() * seconds)),
            sequences_per_s=num_sequences / (seconds + SETTLING_S),
            interactive_p50_s=float(p50_s),
            interactive_p99_s=float(p99_s),
            fetches_per_s=self._num_fetches / seconds,
            jobs_per_s=self._num_jobs / seconds,
            least_share=float(shares.min() / shares.mean()),
        )
