"""`python -m tests.bench idle`: memory of a worker that is warm, of its largest jobs, and idle after each of them.

One worker, one job after another of texts of many words. After each the worker has nothing to do for twice as long as it
takes to return what is free. What is promised is the growth of an idle worker since it was warm, whatever it computed.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embedq import tasks
from tests.bench import random_models, real_texts, report, usage
from tests.bench.arguments import whole
from tests.bench.report import Figure
from tests.bench.running import BULK_PRIORITY, Subject, Worker, server, worker

#: Most that an idle worker may have beyond what it had when it was warm.
MAX_GROWTH_MIB = 300.0

#: Seconds without a job after which memory counts as that of an idle worker.
_IDLE_S = 12.0

#: Between two looks at its memory while it computes.
_LOOK_S = 0.05

#: Docstrings whose words the texts are made of.
_NUM_DOCSTRINGS = 2_000

#: Seconds that a job may take: 10,000 long texts are minutes of two cores.
_TIMEOUT_S = 3_600.0

_MIB = 1024**2


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    asked = _parser().parse_args(arguments)
    num_jobs, num_texts = (1, 50) if asked.quick else (asked.jobs, asked.texts)
    with random_models.chosen(asked.random, asked.model) as model, server() as url:
        subject = Subject(model, precision=asked.precision, max_length=asked.max_length)
        with worker(subject, url) as started:
            figures = measure(started, model, num_jobs, num_texts, asked.words)
            told = started.model_line
    report.show(f"{num_jobs} jobs of {num_texts:,} texts of {asked.words} words; {told}", figures)
    if asked.json:
        report.write(asked.json, {"command": "idle", "arguments": arguments, "worker": told}, figures)
    return 0


def measure(started: Worker, model: Path, num_jobs: int, num_texts: int, num_words: int) -> list[Figure]:
    """Memory when warm, the most of each job, and 12 s after it."""
    words = " ".join(real_texts.read(_NUM_DOCSTRINGS, model).mixed).split()
    chance = random.Random(1)
    time.sleep(_IDLE_S)
    warm_mib = _mib(started)
    figures = [Figure("warm_mib", "warm", warm_mib, "MiB")]
    idle_mib = []
    for number in range(1, num_jobs + 1):
        texts = [" ".join(chance.choices(words, k=num_words)) for _ in range(num_texts)]
        begun_s, begun_cpu_s = time.monotonic(), usage.cpu_s(started.pid)
        with _most(started) as most_mib:
            job = tasks.embed.apply_async((texts,), priority=BULK_PRIORITY)
            job.get(timeout=_TIMEOUT_S)
            job.forget()
        took = time.monotonic() - begun_s, usage.cpu_s(started.pid) - begun_cpu_s
        time.sleep(_IDLE_S)
        idle_mib.append(_mib(started))
        figures += [
            Figure(f"job_{number}_most_mib", f"job {number}: most", max(most_mib), "MiB"),
            Figure(f"job_{number}_idle_mib", f"job {number}: idle for {_IDLE_S:.0f} s", idle_mib[-1], "MiB"),
            Figure(f"job_{number}_s", f"job {number}: took", took[0], "s"),
            Figure(f"job_{number}_cpu_s", f"job {number}: processor time", took[1], "s"),
        ]
    growth_mib = max(idle_mib) - warm_mib
    return [*figures, Figure("growth_mib", "idle, beyond warm", growth_mib, "MiB", MAX_GROWTH_MIB, is_limit=True)]


@contextmanager
def _most(started: Worker) -> Iterator[list[float]]:
    """Memory of the worker every so often meanwhile, in MiB."""
    seen = [_mib(started)]
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(_LOOK_S):
            seen.append(_mib(started))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield seen
    finally:
        is_over.set()
        looking.join()


def _mib(started: Worker) -> float:
    return usage.rss_bytes(started.pid) / _MIB


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench idle", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one job of few texts: shows that it runs")
    parser.add_argument("--jobs", type=whole(), default=2, help="jobs, one after another (2)")
    parser.add_argument("--texts", type=whole(), default=3_000, help="texts of a job (3000)")
    parser.add_argument("--words", type=whole(), default=200, help="words of a text (200)")
    parser.add_argument("--max-length", type=whole(3), default=256, help="tokens that a text is cut to (256)")
    parser.add_argument("--model", type=Path, help="directory of the model (MiniLM)")
    parser.add_argument("--random", choices=sorted(random_models.SHAPES), help="random weights of this shape instead")
    parser.add_argument("--precision", default="auto", help="of the worker (auto)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser
