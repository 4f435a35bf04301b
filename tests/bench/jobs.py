"""`python -m tests.bench jobs`: what a job costs beside its forward pass, against stock Celery.

One worker with a model that costs nothing, one text per job, events on. Ours is the production path
with another model; stock is Celery with its own transport, pools and result backend, and a task that
returns the same vector. The same through a proxy that delays the network. Then the producers.

One run, one machine, one server; rounds alternate, so that a slow minute meets all. Ratios count.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench import draining, producing, report
from tests.bench.arguments import whole
from tests.bench.delay import delaying
from tests.bench.draining import OURS, Drained, Kind, Subject, stock_kind
from tests.bench.report import Figure
from tests.bench.running import server

#: The stock worker as it comes with each pool, and tuned: more prefetched, more threads.
_STOCK = (
    stock_kind("solo", 1, 4),
    stock_kind("solo", 1, 128),
    stock_kind("threads", 1, 4),
    stock_kind("threads", 8, 16),
)

#: Jobs of ours for each of a stock worker, that both take seconds: beside the server, and behind the delay.
_SHARES = {"near": 8, "far": 100}

_TARGETS = {"near": 5.0, "far": 20.0}

#: What a producer sends, for each of our jobs.
_SENT_SHARE = 10


@dataclass(frozen=True)
class Asked:
    """How much is measured."""

    num_jobs: int
    num_rounds: int
    delay_ms: float
    stock: tuple[Kind, ...]


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    given = _parser().parse_args(arguments)
    asked = (
        Asked(given.jobs or 1_000, 1, given.delay_ms, _STOCK[:1])
        if given.quick
        else Asked(given.jobs or 20_000, given.rounds, given.delay_ms, _STOCK)
    )
    figures = measure(asked)
    report.show(
        f"one-text jobs, a model that costs nothing, {asked.num_jobs:,} jobs, {asked.num_rounds} rounds", figures
    )
    if given.json:
        run = {"command": "jobs", "arguments": arguments, "num_jobs": asked.num_jobs, "rounds": asked.num_rounds}
        report.write(given.json, run, figures)
    return 0


def measure(asked: Asked) -> list[Figure]:
    """All figures, in the order of the table."""
    with server() as url:
        port = int(url.rpartition("/")[0].rpartition(":")[2])
        figures = _of_workers("near", "beside the server", url, asked, None)
        with delaying(port, asked.delay_ms) as far_port:
            told = f"{asked.delay_ms:g} ms away each way"
            figures += _of_workers("far", told, url, asked, far_port)
        rates = producing.rates(url, max(100, asked.num_jobs // _SENT_SHARE), asked.num_rounds)
    return figures + _of_producers(rates)


def _of_workers(key: str, told: str, url: str, asked: Asked, through_port: int | None) -> list[Figure]:
    """All workers, each in every round."""
    with ExitStack() as stack:
        subjects = [
            stack.enter_context(draining.running(kind, url, database, through_port))
            for database, kind in enumerate((OURS, *asked.stock))
        ]
        for subject in subjects:
            subject.wait_until_ready()
        counts = [asked.num_jobs] + [max(50, asked.num_jobs // _SHARES[key])] * len(asked.stock)
        rounds: list[list[Drained]] = [[] for _ in subjects]
        for number in range(asked.num_rounds + 1):
            for subject, count, drained in zip(subjects, counts, rounds, strict=True):
                if number:
                    drained.append(subject.drain(count))
                else:  # opens connections, sends scripts
                    subject.drain(max(20, count // 10))
        return _compared(key, told, subjects, rounds)


def _compared(key: str, told: str, subjects: list[Subject], rounds: list[list[Drained]]) -> list[Figure]:
    ours, *stock = rounds
    rates = [median(one.jobs_per_s for one in drained) for drained in rounds]
    best = max(range(1, len(rates)), key=rates.__getitem__)
    figures = [
        Figure(f"{key}_ours_jobs_per_s", f"{told}: ours", rates[0], "jobs/s"),
        *_costs(f"{key}_ours", ours),
    ]
    for number, (subject, drained) in enumerate(zip(subjects[1:], stock, strict=True), 1):
        name = subject.kind.name
        figures.append(Figure(f"{key}_stock_{number}_jobs_per_s", f"{told}: {name}", rates[number], "jobs/s"))
        if number == best:
            figures += _costs(f"{key}_stock", drained)
    ratio = rates[0] / rates[best]
    return [*figures, Figure(f"{key}_ratio", f"{told}: ours to the best stock worker", ratio, "", _TARGETS[key])]


def _costs(key: str, drained: list[Drained]) -> list[Figure]:
    """What one job costs, medians over the rounds."""
    figures = [
        Figure(
            f"{key}_worker_us", "  worker", median(one.each_us(one.worker_cpu_s) for one in drained), "µs of CPU/job"
        )
    ]
    for name in drained[0].thread_cpu_s:
        value = median(one.each_us(one.thread_cpu_s.get(name, 0.0)) for one in drained)
        if value >= 1:
            figures.append(Figure(f"{key}_{name}_us", f"    thread {name}", value, "µs of CPU/job"))
    reads = median(one.server.num_reads / one.num_jobs for one in drained)
    commands = median(sum(one.server.calls.values()) / one.num_jobs for one in drained)
    server_us = median(one.each_us(one.server.cpu_s) for one in drained)
    return [
        *figures,
        Figure(f"{key}_server_us", "  server", server_us, "µs of CPU/job"),
        Figure(f"{key}_round_trips", "  times that the server was sent something", reads, "per job"),
        Figure(f"{key}_commands", "  commands, those within scripts included", commands, "per job"),
    ]


def _of_producers(rates: dict[str, list[float]]) -> list[Figure]:
    delay, many, stock = (median(rates[name]) for name in ("delay", "embed_many", "stock"))
    return [
        Figure("delay_jobs_per_s", "sending: tasks.embed.delay", delay, "jobs/s"),
        Figure("embed_many_jobs_per_s", "sending: tasks.embed_many", many, "jobs/s"),
        Figure("stock_delay_jobs_per_s", "sending: stock .delay, with its SUBSCRIBE", stock, "jobs/s"),
        Figure("delay_ratio", "  delay to stock", delay / stock, ""),
        Figure("embed_many_ratio", "  embed_many to stock", many / stock, ""),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench jobs", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few jobs, one round, one stock worker: shows that it runs"
    )
    parser.add_argument("--rounds", type=whole(), default=5, help="rounds, of which the median counts (5)")
    parser.add_argument("--jobs", type=whole(), help="jobs of one queue for ours (20000); stock workers get fewer")
    parser.add_argument("--delay-ms", type=float, default=1.0, help="what the proxy delays, each way (1)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser
