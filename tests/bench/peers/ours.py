"""embedq as a system among its peers: a real server, one real worker, jobs sent and results stored."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from embedq import tasks
from tests.bench import usage
from tests.bench.peers.models import Model
from tests.bench.peers.process import CannotMeasure
from tests.bench.peers.systems import LARGE, SMALL
from tests.bench.peers.texts import PASSAGES_PER_CALL, Work
from tests.bench.running import ALIAS, BULK_PRIORITY, POLL_S, Subject, worker

#: One round; beyond it the worker has stopped.
_TIMEOUT_S = 3_600.0

#: Jobs whose results one question asks for.
_ASKED_AT_ONCE = 64

#: Where the server keeps waiting jobs of this priority.
_QUEUES = tuple(f"{name}:{BULK_PRIORITY}" for name in ("embed", "rerank"))


class Ours:
    """Seconds run from the first send until the last result is stored. One-text jobs: `concurrency` at once."""

    ways = (LARGE, SMALL)

    def __init__(self, url: str, precision: str, concurrency: int, stops_after_turn: bool = False) -> None:
        """`stops_after_turn` where others of ours are measured: they would take jobs from the same queue."""
        self.stops_after_turn = stops_after_turn
        self.name = "embedq" if precision == "auto" else f"embedq-{precision}"
        self._url = url
        self._precision = precision
        self._concurrency = concurrency
        self._stack = ExitStack()

    def start(self, model: Model, first: Work) -> dict[str, Any]:
        """As `System.start`."""
        settings = {"default_embed": "none"} if model.task == "rerank" else {}
        subject = Subject(model.directory, "cpu", self._precision, settings, model.max_length)
        try:
            self._worker = self._stack.enter_context(worker(subject, self._url))
        except AssertionError as error:  # it did not become ready; its log says why
            lines = str(error).splitlines()
            raise CannotMeasure(next((line for line in lines if "ERROR" in line), lines[-1])[:300]) from None
        self.measure(LARGE, first.first(PASSAGES_PER_CALL), None)
        words = dict(word.split("=", 1) for word in self._worker.model_line.split() if "=" in word)
        return {"precision": words.get("precision", "unknown"), "line": self._worker.model_line}

    def measure(self, way: str, work: Work, save: Path | None) -> float:
        """As `System.measure`."""
        jobs = _jobs(work, 1 if way == SMALL else PASSAGES_PER_CALL)
        deadline_s = time.monotonic() + _TIMEOUT_S
        started_s = time.perf_counter()
        ids = self._send_all(jobs, deadline_s) if way == SMALL else _send(jobs)
        self._wait(ids, deadline_s)
        seconds = time.perf_counter() - started_s
        if save:
            np.save(save, np.concatenate([_rows(job_id) for job_id in ids]))
        self._worker.forget(ids)
        return seconds

    @property
    def peak_bytes(self) -> int:
        """As `System.peak_bytes`: the worker's."""
        return usage.peak_bytes(self._worker.pid)

    def stop(self) -> None:
        """As `System.stop`."""
        self._stack.close()

    def forget(self) -> None:
        """Nothing: ours has nothing to choose."""

    def _send_all(self, jobs: list[Any], deadline_s: float) -> list[str]:
        """Never more than `concurrency` that are not done."""
        ids: list[str] = []
        while len(ids) < len(jobs):
            room = self._concurrency - self._num_under_way()
            if room < max(1, self._concurrency // 8):
                _rest(deadline_s)
                continue
            ids += _send(jobs[len(ids) : len(ids) + room])
        return ids

    def _num_under_way(self) -> int:
        with self._worker.client.pipeline(transaction=False) as both:
            for queue in _QUEUES:
                both.llen(queue)
            return int(sum(both.hlen("unacked").execute()))

    def _wait(self, ids: list[str], deadline_s: float) -> None:
        """Until every job has a result."""
        at = 0
        while at < len(ids):
            asked = ids[at : at + _ASKED_AT_ONCE]
            if self._worker.num_done(asked) == len(asked):
                at += len(asked)
            else:
                _rest(deadline_s)


def _jobs(work: Work, num_texts: int) -> list[Any]:
    """What `embed_many` or `rerank_many` takes."""
    if work.texts:
        return [work.texts[at : at + num_texts] for at in range(0, len(work.texts), num_texts)]
    return [
        (query, passages[at : at + num_texts])
        for query, passages in work.calls
        for at in range(0, len(passages), num_texts)
    ]


def _send(jobs: list[Any]) -> list[str]:
    sending = {"priority": BULK_PRIORITY}
    sent = (
        tasks.rerank_many(jobs, sending, model=ALIAS, normalize=False)
        if isinstance(jobs[0], tuple)
        else tasks.embed_many(jobs, sending)
    )
    return [str(job.id) for job in sent]


def _rows(job_id: str) -> np.ndarray:
    """(num_texts, dim) vectors, or (num_passages,) scores."""
    result = tasks.app.AsyncResult(job_id).get(timeout=_TIMEOUT_S)
    return np.asarray(result.dense if hasattr(result, "dense") else result.scores)


def _rest(deadline_s: float) -> None:
    if time.monotonic() > deadline_s:
        raise CannotMeasure(f"the jobs were not done within {_TIMEOUT_S:.0f} s")
    time.sleep(POLL_S)
