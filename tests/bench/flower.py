"""`python -m tests.bench flower`: memory of a real Flower fed with the events of many jobs through a real server.

Each job is three events (received, started, succeeded) with the fields that our workers send. Flower runs as
`deploy/flower` starts it, and once more with room for all of the jobs.
"""

from __future__ import annotations

import argparse
import re
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from embedq import tasks
from embedq.deploy import flower
from tests.bench import report, usage
from tests.bench.arguments import whole
from tests.bench.report import Figure
from tests.bench.running import server
from tests.running import Running

#: Jobs told of at once: far below what a server buffers for a subscriber before it cuts it off.
_LOT = 500

#: Seconds that Flower may take to take note of a lot.
_TIMEOUT_S = 120.0

_MIB = 1024**2

#: What Flower may take with our settings, whatever passes by: the bound that README names.
_MAX_MIB = 200.0

_COUNTED = re.compile(r'^flower_events_total\{.*type="task-[a-z]+".*\} (\S+)$', re.MULTILINE)


class Fed:
    """A running Flower, and a worker's voice."""

    def __init__(self, running: Running, address: str, dispatcher: Any) -> None:
        self.running = running
        self._address = address
        self._dispatcher = dispatcher
        self._num_sent = 0

    @property
    def mib(self) -> float:
        """Its memory now."""
        return usage.rss_bytes(self.running.process.pid) / _MIB

    def wait_until_it_listens(self) -> None:
        """Speak until it hears: what is said before it has subscribed is lost."""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while "flower_worker_online" not in self._metrics() or "bench@bench" not in self._metrics():
            assert time.monotonic() < deadline_s, self.running.output
            self._dispatcher.send("worker-heartbeat", freq=5, active=0, processed=0)
            time.sleep(0.1)

    def feed(self, num_jobs: int) -> float:
        """Tell of so many jobs; returns the seconds that Flower took to take note of them."""
        begun_s = time.monotonic()
        for first in range(0, num_jobs, _LOT):
            for _ in range(min(_LOT, num_jobs - first)):
                self._tell()
            self._dispatcher.flush()
            self._wait()
        return time.monotonic() - begun_s

    def _tell(self) -> None:
        job, send = str(uuid4()), self._dispatcher.send
        named = {"name": "tasks.embed", "args": "128 texts, 14,202 characters", "kwargs": "{}"}
        ids = {"root_id": job, "parent_id": None, "retries": 0, "eta": None, "expires": None}
        send("task-received", uuid=job, **named, **ids)
        send("task-started", uuid=job)
        send("task-succeeded", uuid=job, result="128 × 384 float32", runtime=0.0123)
        self._num_sent += 3

    def _wait(self) -> None:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while (num_noted := sum(map(float, _COUNTED.findall(self._metrics())))) < self._num_sent:
            assert time.monotonic() < deadline_s, f"{num_noted:.0f} of {self._num_sent} events noted"
            time.sleep(0.01)

    def _metrics(self) -> str:
        with urllib.request.urlopen(f"{self._address}/metrics", timeout=_TIMEOUT_S) as answer:
            return str(answer.read().decode())


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    given = _parser().parse_args(arguments)
    figures = measure(given.jobs)
    report.show(f"Flower and {given.jobs:,} jobs", figures)
    if given.json:
        report.write(given.json, {"command": "flower", "arguments": arguments, "num_jobs": given.jobs}, figures)
    return 0


def measure(num_jobs: int) -> list[Figure]:
    """Memory with our settings, at every fifth of the jobs; and with room for all of them."""
    figures = []
    with server() as url, _flower(url) as fed:
        before_mib, took_s = fed.mib, 0.0
        figures.append(Figure("ours_before", "our settings: at the start", before_mib, "MiB"))
        for part in range(1, 6):
            took_s += fed.feed(num_jobs // 5)
            done = part * (num_jobs // 5)
            is_last = part == 5
            target: dict[str, Any] = {"target": _MAX_MIB, "is_limit": True} if is_last else {}
            figures.append(Figure(f"ours_{done}", f"our settings: after {done:,} jobs", fed.mib, "MiB", **target))
        figures.append(Figure("jobs_per_s", "jobs noted", num_jobs / took_s, "jobs/s"))
    with server() as url, _flower(url, f"--max-tasks={num_jobs}") as fed:
        before_mib = fed.mib
        fed.feed(num_jobs)
        what = f"room for all: after {num_jobs:,} jobs"
        figures.append(Figure("all_after", what, fed.mib, "MiB"))
        figures.append(
            Figure("kib_per_task", "room for all: each task", (fed.mib - before_mib) * 1024 / num_jobs, "KiB")
        )
    return figures


@contextmanager
def _flower(url: str, *options: str) -> Iterator[Fed]:
    with Running([*flower.command(0), *options], {"EMBEDQ_REDIS_URL": url, **flower.OPEN}) as running:
        address = running.wait_for(flower.READY)[0].rpartition(" ")[2]
        with (
            tasks.app.connection_for_write() as connection,
            tasks.app.events.Dispatcher(
                connection, hostname="bench@bench", buffer_group=["task"], buffer_limit=1_000
            ) as dispatcher,
        ):
            fed = Fed(running, address, dispatcher)
            fed.wait_until_it_listens()
            yield fed
        running.stop(flower.STOP_TIMEOUT_S)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench flower", description=__doc__)
    parser.add_argument("--jobs", type=whole(), default=50_000, help="jobs it hears of (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser
