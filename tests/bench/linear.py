"""`python -m tests.bench linear`: a thousand texts and a million cost the same, each, in time and in memory.

Texts of a few words, all different, in jobs of 256 through a real server and a real worker, as a program with millions
of them sends them: it keeps some jobs under way, reads results in order, and drops each once it is read.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from celery.result import AsyncResult

from embedq import tasks
from embedq.deploy.demo import minilm
from tests.bench import real_texts, report, usage
from tests.bench.arguments import whole
from tests.bench.report import Figure
from tests.bench.running import BULK_PRIORITY, Subject, Worker, server, worker

#: Texts of a run, one run after the other with one worker.
SIZES = (1_000, 10_000, 100_000, 1_000_000)

#: Texts of a job, and jobs under way: enough that the worker never waits for the producer.
_TEXTS_PER_JOB, _MAX_UNDER_WAY = 256, 64

#: Jobs sent in one go.
_SENT_TOGETHER = 8

#: Docstrings whose words texts are made of, and words of a text.
_NUM_DOCSTRINGS, _WORDS = 2_000, (2, 6)

#: Seconds that one result may take.
_TIMEOUT_S = 300.0

#: Texts/s of the largest run, of the best of the others; it may be a tenth less, for the machine has other work too.
_LEAST_SHARE = 0.9

#: What the worker's memory may grow between the ends of the last two runs. Before that it grows by the kernels that
#: are built for each shape of a batch, some hundreds at most.
_MAX_GROWTH_MIB = 64.0

_MIB = 1024**2


@dataclass(frozen=True)
class Run:
    """One run's cost."""

    num_texts: int
    seconds: float
    worker_bytes: int
    producer_bytes: int
    server_bytes: int


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    given = _parser().parse_args(arguments)
    sizes = [size for size in SIZES if size <= given.texts]
    figures = measure(Subject(given.model or minilm.directory(), precision=given.precision), sizes)
    report.show(f"{', '.join(f'{size:,}' for size in sizes)} texts", figures)
    if given.json:
        report.write(given.json, {"command": "linear", "arguments": arguments}, figures)
    return 0


def measure(subject: Subject, sizes: list[int]) -> list[Figure]:
    """All runs in turn, and what they say together."""
    texts = _texts(subject.model)
    with server() as url, worker(subject, url) as running:
        pid = running.pid
        _run(running, islice(texts, 20 * _TEXTS_PER_JOB))  # what is allocated once is allocated now
        runs = []
        for size in sizes:
            started_s = time.perf_counter()
            _run(running, islice(texts, size))
            seconds = time.perf_counter() - started_s
            in_server = int(running.client.info("memory")["used_memory"])
            runs.append(Run(size, seconds, usage.rss_bytes(pid), usage.rss_bytes(os.getpid()), in_server))
            print(f"{size:,} texts in {seconds:.1f} s", flush=True)
        return [*_figures(runs), *_memory(running, subject.model, pid)]


def _run(running: Worker, texts: Iterator[str]) -> None:
    """Send, read and drop; memory never holds more than what is under way."""
    under_way: deque[AsyncResult] = deque()
    jobs = iter(lambda: list(islice(texts, _TEXTS_PER_JOB)), [])
    while True:
        lot = list(islice(jobs, _SENT_TOGETHER))
        under_way.extend(tasks.embed_many(lot, {"priority": BULK_PRIORITY}) if lot else ())
        while under_way and (not lot or len(under_way) > _MAX_UNDER_WAY - _SENT_TOGETHER):
            job = under_way.popleft()
            assert np.isfinite(job.get(timeout=_TIMEOUT_S).dense).all()
            job.forget()
        if not lot:
            return


def _texts(model: Path) -> Iterator[str]:
    """Texts of a few words without end, no two alike."""
    draw = random.Random(0)
    words = " ".join(real_texts.read(_NUM_DOCSTRINGS, model).short).split()
    number = 0
    while True:
        number += 1
        yield f"{' '.join(draw.choices(words, k=draw.randint(*_WORDS)))} {number}"


def _figures(runs: list[Run]) -> list[Figure]:
    figures = []
    for run in runs:
        told = f"{run.num_texts:,} texts"
        figures.append(Figure(f"texts_s_{run.num_texts}", told, run.num_texts / run.seconds, "texts/s"))
        for name in ("worker", "producer", "server"):
            mib = getattr(run, f"{name}_bytes") / _MIB
            figures.append(Figure(f"{name}_mib_{run.num_texts}", f"{told}: {name}'s memory then", mib, "MiB"))
    speeds = [run.num_texts / run.seconds for run in runs]
    growth = (runs[-1].worker_bytes - runs[-2].worker_bytes) / _MIB if len(runs) > 1 else None
    share = speeds[-1] / max(speeds)
    return [
        *figures,
        Figure("flat", "texts/s of the largest run, of the best of all", share, "", _LEAST_SHARE),
        Figure(
            "growth",
            "worker: growth between the ends of the last two runs",
            growth,
            "MiB",
            _MAX_GROWTH_MIB,
            is_limit=True,
        ),
    ]


def _memory(running: Worker, model: Path, pid: int) -> list[Figure]:
    """What a worker takes beside its weights, and a vector in the server."""
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    (job,) = tasks.embed_many([["a text"] * _TEXTS_PER_JOB])
    vectors = job.get(timeout=_TIMEOUT_S).dense
    blob = int(running.client.strlen(f"celery-task-meta-{job.id}"))
    job.forget()
    return [
        Figure("weights_mib", "weights in their file", weights / _MIB, "MiB"),
        Figure("worker_peak_mib", "worker: most memory ever", usage.peak_bytes(pid) / _MIB, "MiB"),
        Figure("vector_bytes", f"a stored vector of {vectors.shape[1]} numbers", blob / _TEXTS_PER_JOB, "bytes"),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench linear", description=__doc__)
    parser.add_argument("--texts", type=whole(), default=SIZES[-1], help="the largest run (%(default)s)")
    parser.add_argument("--model", type=Path, help="a model directory (MiniLM)")
    parser.add_argument("--precision", default="auto", help="as the setting (auto)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser
