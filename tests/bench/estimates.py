"""How far estimates are from what comes: jobs of mixed sizes and classes under a load that changes.

    python -m tests.bench estimates
    python -m tests.bench estimates --seconds 60 --seed 7 --json figures.json

Bulk jobs of 1 to 2,000 texts and interactive ones of 1 to 30 come in waves, so that the queue is empty at times and a
quarter of a minute long at others. Every second or two one more job is estimated as it is sent (`tasks.estimate`), and once more while it waits or
runs (`tasks.eta`); both are held against the moment it is done.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedq import tasks
from embedq.core.errors import InvalidSettings
from embedq.deploy.demo import minilm
from tests.bench.report import Figure, show, write
from tests.bench.running import Subject, server, worker

#: What is promised: the median error, and the ratio that nine of ten stay below.
MAX_MEDIAN_ERROR, MAX_P90_RATIO = 0.30, 2.0

#: Seconds that a job may take at the end.
_TIMEOUT_S = 300.0

#: Seconds of work that wait at most.
_MAX_AHEAD_S = 15.0

_WORDS = ["cat", "dog", "sun", "rain", "tree", "stone", "river", "house", "road", "night", "light", "fire", "water"]


@dataclass
class Trial:
    """One job that was estimated."""

    num_texts: int
    priority: int
    estimated_s: float
    #: (seconds since it was sent, estimate of what is left)
    etas: list[tuple[float, float]] = field(default_factory=list)
    took_s: float = 0.0


class Load:
    """Jobs in waves, on a thread of its own until `end`."""

    def __init__(self, seed: int, tokens_per_second: float) -> None:
        self._random = random.Random(seed)
        self._texts_per_s = tokens_per_second / _MEAN_TOKENS
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            part = self._random.choice([0.0, 0.5, 1.0, 1.6])  # of what the worker computes
            until_s = time.monotonic() + self._random.uniform(4, 10)
            while time.monotonic() < until_s and not self._over.is_set():
                priority = self._random.choice([0, 9])
                num_texts = size(self._random, self._texts_per_s, priority)
                # What comes is bounded by what the worker gets done, whatever else the machine does meanwhile.
                if part and (tasks.estimate(0, priority=9) or 0.0) < _MAX_AHEAD_S:
                    send(self._random, num_texts, priority, ignore_result=True)
                self._over.wait(num_texts / self._texts_per_s / part if part else 1.0)


#: Words of a text, and the tokens that they are on average, with the special ones.
_NUM_WORDS = (4, 60)
_MEAN_TOKENS = sum(_NUM_WORDS) / 2 + 2


def size(chosen: random.Random, texts_per_s: float, priority: int) -> int:
    """Texts of a job, small ones most often: bulk is up to some seconds of work, interactive up to 30 texts."""
    texts = chosen.lognormvariate(0, 1.3) * texts_per_s / 3 if priority else chosen.lognormvariate(1, 1)
    return max(1, min(2_000 if priority else 30, int(texts)))


def send(chosen: random.Random, num_texts: int, priority: int, **options: Any) -> Any:
    texts = [" ".join(chosen.choices(_WORDS, k=chosen.randint(*_NUM_WORDS))) for _ in range(num_texts)]
    return tasks.embed.apply_async((texts,), priority=priority, **options)


def follow(trial: Trial, job: Any, sent_s: float) -> None:
    """Estimate once more while it waits or runs, then wait for its end. On a thread of its own."""
    due_s = trial.estimated_s / 2
    time.sleep(min(due_s, 10.0))
    left_s = tasks.eta(job.id, trial.priority)
    if left_s:
        trial.etas.append((time.monotonic() - sent_s, left_s))
    job.get(timeout=_TIMEOUT_S)
    trial.took_s = time.monotonic() - sent_s


def measure(seconds: float, seed: int) -> list[Trial]:
    """Jobs estimated over so many seconds, all of them done."""
    chosen, trials, threads = random.Random(seed), list[Trial](), list[threading.Thread]()
    tokens_per_second = warm(chosen)
    with Load(seed + 1, tokens_per_second):
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            priority = chosen.choice([0, 9])
            num_texts = size(chosen, tokens_per_second / _MEAN_TOKENS, priority)
            estimated_s = tasks.estimate(num_texts, priority=priority)
            if estimated_s is None:
                raise InvalidSettings("no worker has measured its speed")
            sent_s = time.monotonic()
            job = send(chosen, num_texts, priority)
            trials.append(Trial(num_texts, priority, estimated_s))
            threads.append(threading.Thread(target=follow, args=(trials[-1], job, sent_s)))
            threads[-1].start()
            time.sleep(chosen.uniform(0.8, 1.6))
        for thread in threads:
            thread.join()
    return [trial for trial in trials if trial.took_s]


def warm(chosen: random.Random) -> float:
    """Let the worker measure itself; returns its tokens per second."""
    from embedq.tasks.speeds import Speeds

    speeds = Speeds(tasks.app.backend.client, tasks.key_prefix(tasks.app))
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        send(chosen, 64, 9).get(timeout=_TIMEOUT_S)
        found = [speed.tokens_per_second for speed in speeds.latest().values() if speed.tokens_per_text]
        if found and found[0]:
            return found[0]
    raise InvalidSettings("the worker has not measured its speed within a minute")


def figures_of(trials: list[Trial]) -> list[Figure]:
    pairs = {
        "estimate": [(trial.estimated_s, trial.took_s) for trial in trials],
        "eta": [
            (left_s, trial.took_s - at_s)
            for trial in trials
            for at_s, left_s in trial.etas
            if trial.took_s - at_s > 0.1
        ],
    }
    figures = [Figure("jobs", "jobs estimated", len(trials), "")]
    for name, found in pairs.items():
        estimated, real = np.array(found).T
        errors = np.abs(estimated - real) / real
        ratios = np.maximum(estimated / real, real / estimated)
        figures += [
            Figure(
                f"{name}_median_error", f"{name}: median error", float(np.median(errors)), "", MAX_MEDIAN_ERROR, True
            ),
            Figure(
                f"{name}_p90_ratio",
                f"{name}: nine of ten within",
                float(np.percentile(ratios, 90)),
                "x",
                MAX_P90_RATIO,
                True,
            ),
        ]
    return figures


def main(arguments: list[str]) -> int:
    """Measure; returns the exit code."""
    parser = argparse.ArgumentParser("python -m tests.bench estimates", description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0, help="for so long jobs are sent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="20 seconds: shows that it works")
    parser.add_argument("--json", type=Path, help="write the figures here")
    given = parser.parse_args(arguments)
    with server() as url, worker(Subject(minilm.directory()), url):
        trials = measure(20.0 if given.quick else given.seconds, given.seed)
    figures = figures_of(trials)
    show("how far estimates are from what came", figures)
    if given.json:
        write(given.json, {"seed": given.seed, "trials": [asdict(trial) for trial in trials]}, figures)
    return 0
