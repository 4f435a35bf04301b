"""What jobs cost the server: bytes while they wait, bytes of their results, and microseconds of its one thread.

A real server with its append-only file on, and one real worker; jobs are sent before the worker is there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from tests.bench import real_texts
from tests.bench.report import Figure
from tests.bench.running import POLL_S, Subject, Worker, server
from tests.running import start_workers

#: Texts of a large job, and how many such jobs.
LARGE_TEXTS, NUM_LARGE = 256, 6

#: Seconds that all jobs of one kind may take.
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class _Look:
    """The server's counters at one moment."""

    used_bytes: int
    written_bytes: int
    num_commands: int
    cpu_s: float
    received_bytes: int
    sent_bytes: int


def measured(model: Path, num_jobs: int) -> list[Figure]:
    """Figures of one-text jobs and of large ones."""
    found = real_texts.read(max(num_jobs, NUM_LARGE * LARGE_TEXTS), model)
    kinds = {
        "one": [[text] for text in found.mixed[:num_jobs]],
        "large": [found.short[n * LARGE_TEXTS : (n + 1) * LARGE_TEXTS] for n in range(NUM_LARGE)],
    }
    figures = []
    for kind, jobs in kinds.items():
        with server() as url:
            figures += _figures(kind, len(jobs[0]), *_run(url, Subject(model), jobs), jobs)
    return figures


def _run(url: str, subject: Subject, jobs: list[list[str]]) -> tuple[_Look, _Look, _Look, _Look]:
    """The counters before jobs are sent, while all wait, once a worker is there, and after all are answered."""
    with redis.Redis.from_url(url) as client:
        sender = Worker(url, "", [])
        empty = _look(client)
        sender.send(jobs)
        waiting = _look(client)
        with start_workers(subject.environment(url), "--cpu-workers", "1"):
            started = _look(client)
            deadline_s = time.monotonic() + _TIMEOUT_S
            while sum(sender.num_waiting()):
                if time.monotonic() > deadline_s:
                    raise RuntimeError(f"the jobs were not answered within {_TIMEOUT_S:.0f} s")
                time.sleep(10 * POLL_S)
            done = _look(client)
        return empty, waiting, started, done


def _look(client: redis.Redis) -> _Look:
    told: Any = client.info()
    return _Look(
        used_bytes=told["used_memory"],
        written_bytes=told["aof_current_size"],
        num_commands=told["total_commands_processed"],
        cpu_s=told["used_cpu_user_main_thread"] + told["used_cpu_sys_main_thread"],
        received_bytes=told["total_net_input_bytes"],
        sent_bytes=told["total_net_output_bytes"],
    )


def _figures(
    kind: str, num_texts: int, empty: _Look, waiting: _Look, started: _Look, done: _Look, jobs: list[list[str]]
) -> list[Figure]:
    num = len(jobs)
    num_bytes = sum(len(text.encode()) for texts in jobs for text in texts) / num
    of = f"job of {num_texts} text{'s' if num_texts > 1 else ''}: "

    def figure(key: str, what: str, value: float, unit: str) -> Figure:
        return Figure(f"{kind}_{key}", of + what, value / num, unit)

    return [
        figure("text_bytes", "its texts", num_bytes * num, "bytes"),
        figure("waiting_bytes", "memory while it waits", waiting.used_bytes - empty.used_bytes, "bytes"),
        figure("sent_us", "server's thread, taking it in", 1e6 * (waiting.cpu_s - empty.cpu_s), "us"),
        figure("result_bytes", "memory of its result", done.used_bytes - empty.used_bytes, "bytes"),
        figure("served_us", "server's thread, from the queue to the result", 1e6 * (done.cpu_s - started.cpu_s), "us"),
        figure("commands", "commands processed", done.num_commands - empty.num_commands, ""),
        figure("written_bytes", "append-only file", done.written_bytes - empty.written_bytes, "bytes"),
        figure("received_bytes", "received by the server", done.received_bytes - empty.received_bytes, "bytes"),
        figure("sent_bytes", "sent by the server", done.sent_bytes - empty.sent_bytes, "bytes"),
    ]
