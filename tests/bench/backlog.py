"""Throughput of a deep backlog: the queue is filled while the worker takes nothing, then it is let go.

Results are counted by the server, not fetched: while the worker computes, this process asks every
10 ms how many jobs wait and how many are held, which takes some 2 % of one core.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from tests.bench import usage
from tests.bench.running import POLL_S, Worker

#: A backlog takes minutes at most; beyond this the worker has stopped.
_TIMEOUT_S = 1_800.0


@dataclass(frozen=True)
class Drained:
    """One backlog, from the moment that the worker took its first job to the last result."""

    num_texts: int
    seconds: float
    #: What the worker counted meanwhile; empty if it does not count.
    counted: dict[str, float]
    #: Processor seconds of each of the worker's threads, and those in which the machine's cores had nothing to do.
    thread_cpu_s: list[float]
    idle_s: float

    @property
    def texts_per_s(self) -> float:
        return self.num_texts / self.seconds

    @property
    def others_share(self) -> float | None:
        """Processor time of the worker's threads but the device's, to the time that passed: Python, and the tokenizer."""
        if "streams" not in self.counted:
            return None
        by_use = sorted(self.thread_cpu_s, reverse=True)
        return sum(by_use[int(self.counted["streams"]) :]) / self.seconds

    @property
    def idle_share(self) -> float:
        """On a CPU what passes wait for the interpreter's lock and for work, where nothing else runs on the machine."""
        return self.idle_s / self.seconds / (os.cpu_count() or 1)


def jobs_of(texts: list[str], texts_per_job: int) -> list[list[str]]:
    """`texts` in their order, cut into jobs."""
    return [texts[start : start + texts_per_job] for start in range(0, len(texts), texts_per_job)]


def drain(
    worker: Worker, jobs: list[list[str]], meanwhile: Callable[[Callable[[], bool]], None] | None = None
) -> Drained:
    """Fill the queue with `jobs`, let the worker go, and wait for all results.

    `meanwhile` is called once it has begun, with a question whether it has ended, and returns then.
    """
    worker.pause()
    ids = worker.send(jobs)
    before = worker.stats()
    worker.resume()
    deadline_s = time.monotonic() + _TIMEOUT_S
    while worker.num_waiting() == (len(jobs), 0):
        _rest(deadline_s)
    started_s, used = time.monotonic(), _Used(worker.pid)
    end_s: list[float] = []

    def has_ended() -> bool:
        if not end_s and worker.num_done(ids) == len(ids):
            end_s.append(time.monotonic())
            used.end()
        return bool(end_s)

    if meanwhile is not None:
        meanwhile(has_ended)
    # Looked at before the results are counted: thousands of keys are not worth asking for each time.
    while any(worker.num_waiting()) or not has_ended():
        _rest(deadline_s)
    after = worker.stats()
    worker.forget(ids)
    counted = {name: after[name] - value for name, value in before.items() if isinstance(value, int | float)}
    return Drained(sum(map(len, jobs)), end_s[0] - started_s, counted | _constants(after), used.threads, used.idle_s)


class _Used:
    """Processor time from its making until `end`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before, self._idle_s = usage.thread_cpu_s(pid), usage.idle_s()
        self.threads: list[float] = []
        self.idle_s = 0.0

    def end(self) -> None:
        after = usage.thread_cpu_s(self._pid)
        self.threads = [seconds - self._before.get(thread, 0) for thread, seconds in after.items()]
        self.idle_s = usage.idle_s() - self._idle_s


def alternate(worker: Worker, kinds: dict[str, list[list[str]]], num_rounds: int) -> dict[str, list[Drained]]:
    """Every kind of backlog in each round, so that a slow minute of the machine meets them all."""
    rounds: dict[str, list[Drained]] = {name: [] for name in kinds}
    for _ in range(num_rounds):
        for name, jobs in kinds.items():
            rounds[name].append(drain(worker, jobs))
    return rounds


def texts_per_s(rounds: list[Drained]) -> float:
    """The median."""
    return median(one.texts_per_s for one in rounds)


def _constants(stats: dict[str, float]) -> dict[str, float]:
    """What a difference would make zero."""
    return {name: value for name, value in stats.items() if name.startswith("max_") or name == "streams"}


def _rest(deadline_s: float) -> None:
    if time.monotonic() > deadline_s:
        raise TimeoutError(f"the backlog was not done within {_TIMEOUT_S:.0f} s")
    time.sleep(POLL_S)
