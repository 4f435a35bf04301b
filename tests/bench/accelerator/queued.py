"""The whole path: jobs sent to a real server, computed by a real worker, results stored. Rates are the worker's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

from embedq import tasks
from tests.bench.accelerator import inside, texts
from tests.bench.accelerator.asked import Asked
from tests.bench.report import Figure
from tests.bench.running import ALIAS, BULK_PRIORITY, POLL_S, Subject, Worker, server, worker

#: Texts of a large job.
_LARGE = 256

#: Jobs in the queue and in the worker's hands that are enough: more are sent only below it. By the texts of a job.
_ENOUGH = {1: 20_000, _LARGE: 400}
_QUICK_ENOUGH = {1: 60, _LARGE: 8}

#: Jobs sent in one go, by the texts of a job.
_TOGETHER = {1: 500, _LARGE: 20}

#: Jobs whose success is looked at, and results that are dropped in one go.
_NUM_CHECKED, _DROPPED_TOGETHER = 20, 5_000

#: A worker that does not end its jobs within this has stopped.
_TIMEOUT_S = 120.0

#: What the issue asks of one H200, end to end: by model and kind (tokens/s, texts/s).
TARGETS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("bert-base", "512"): (2_100_000, None),
    ("bert-base", "50"): (None, 28_000),
    ("bge-m3", "512"): (605_000, None),
}

#: Before a rate is counted, part of the time that it is counted for.
_FIRST_SHARE = 0.6


def measure(asked: Asked) -> Iterator[Figure]:
    """Texts per second of each kind, in large jobs and in jobs of one text."""
    settings = {"default_embed": "none"} if asked.is_scored else {}
    subject = Subject(asked.path, asked.device, asked.precision, settings, asked.max_length)
    with server() as url, worker(subject, url) as running:
        for kind, bounds in asked.kinds.items():
            num_before = len(texts.QUERY.split()) + 2 if asked.is_scored else 0
            found = texts.draw(asked.path, bounds, asked.num_texts, seed=1, num_before=num_before)
            for num_texts in (_LARGE, 1):
                if num_texts == 1 and kind == "mixed":
                    continue
                counted, num_left = _count(running, found, num_texts, asked)
                yield from _figures(asked, kind, num_texts, counted, num_left)


def _figures(asked: Asked, kind: str, num_texts: int, counted: dict[str, float], num_left: int) -> Iterator[Figure]:
    is_large = num_texts == _LARGE
    key = f"{asked.model}_queue_{kind}_{'large' if is_large else 'one_text'}"
    told = f"through the queue, {kind} tokens, {f'jobs of {_LARGE}' if is_large else 'one-text jobs'}"
    tokens, of_texts = TARGETS.get((asked.model, kind), (None, None)) if is_large else (None, None)
    for figure in inside.figures(key, told, counted):
        target = {f"{key}_tokens_per_s": tokens, f"{key}_texts_per_s": of_texts}.get(figure.key)
        yield Figure(figure.key, figure.what, figure.value, figure.unit, target)
    # None waiting means that the producer was the slower one.
    yield Figure(f"{key}_waiting", "  jobs that waited at the end", num_left, "")


def _count(running: Worker, found: list[str], num_texts: int, asked: Asked) -> tuple[dict[str, float], int]:
    """What the worker counts while more jobs always wait; and how many did at the end."""
    sender = _Sender(running, found, num_texts, asked)
    try:
        time.sleep(_FIRST_SHARE * asked.seconds)
        before = running.stats()
        time.sleep(asked.seconds)
        after, num_left = running.stats(), sender.num_waiting()
    finally:
        sender.stop()
    return inside.difference(before, after), num_left


class _Sender:
    """Keeps jobs waiting, on a thread of its own, until stopped; then drops what still waits, and all results."""

    def __init__(self, running: Worker, found: list[str], num_texts: int, asked: Asked) -> None:
        self._worker = running
        self._asked = asked
        self._jobs = [found[start : start + num_texts] for start in range(0, len(found), num_texts)]
        self._num_together = _TOGETHER[num_texts]
        self._enough = (_QUICK_ENOUGH if asked.is_quick else _ENOUGH)[num_texts]
        self._queue = f"{'rerank' if asked.is_scored else 'embed'}:{BULK_PRIORITY}"
        self._ids: list[str] = []
        self._is_over = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def num_waiting(self) -> int:
        """Jobs in the queue."""
        return int(self._worker.client.llen(self._queue))

    def stop(self) -> None:
        """End the thread, and wait until the worker holds nothing. RuntimeError if a job failed, or sending did."""
        self._is_over.set()
        self._thread.join()
        client = self._worker.client
        client.delete(self._queue)
        deadline_s = time.monotonic() + _TIMEOUT_S
        while client.hlen("unacked"):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the worker's jobs were not done within {_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        if self._failure:
            raise RuntimeError(f"no more jobs could be sent: {self._failure}") from self._failure
        first = self._ids[:_NUM_CHECKED]
        self._worker.forget([job_id for job_id in first if self._worker.num_done([job_id])])
        for start in range(0, len(self._ids), _DROPPED_TOGETHER):
            self._worker.drop(self._ids[start : start + _DROPPED_TOGETHER])

    def _run(self) -> None:
        try:
            number = 0
            while not self._is_over.is_set():
                with self._worker.client.pipeline(transaction=False) as both:
                    queued, held = both.llen(self._queue).hlen("unacked").execute()
                if queued + held >= self._enough:
                    self._is_over.wait(POLL_S)
                    continue
                some = [self._jobs[(number + index) % len(self._jobs)] for index in range(self._num_together)]
                number += len(some)
                self._ids += self._send(some)
        except Exception as error:  # told by `stop`; a thread's own last words would be lost
            self._failure = error

    def _send(self, jobs: list[list[str]]) -> list[str]:
        sending: dict[str, Any] = {"priority": BULK_PRIORITY}
        if self._asked.is_scored:
            calls = [(texts.QUERY, job) for job in jobs]
            return [str(job.id) for job in tasks.rerank_many(calls, sending, model=ALIAS)]
        return [str(job.id) for job in tasks.embed_many(jobs, sending)]
