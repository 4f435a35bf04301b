"""Encode threads before a backlog that nobody empties, and jobs whose encoding a test sees and holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from embedq.core.batching.backlog import Backlog
from embedq.core.batching.encode_threads import EncodeThreads
from embedq.core.batching.job import Call, Job
from embedq.core.errors import DeviceFailure
from embedq.core.sequence import Tokens, Wanted
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.loops import DENSE, backlog_of

#: Tokens of each row of these jobs.
LENGTH = 10


class Encoder:
    """Jobs whose rows are encoded where the test can see it, and hold it."""

    def __init__(self) -> None:
        self.model = FakeModel()
        #: What encoding waits for.
        self.gate = threading.Event()
        self.gate.set()
        #: One count for each slice that has begun.
        self.begun = threading.Semaphore(0)
        #: (name of the job, first row, row behind the last), in the order of beginning; None for an opened job.
        self.steps: list[tuple[str, int | None, int | None]] = []
        #: The names of the jobs whose rows were encoded in one go, in the order of beginning.
        self.goes: list[list[str]] = []
        #: Called with (name of the job, first row) before a slice is encoded; may raise.
        self.before_slice: Callable[[str, int], None] = lambda name, row: None

    def job(
        self, name: str, num_rows: int, is_bulk: bool = False, num_bytes: int = 0, encoded_as: str | None = None
    ) -> Job:
        """A job whose rows are all different from any other's; those encoded as the same may be in one go."""

        def open_call() -> Call:
            self.steps.append((name, None, None))
            rows, alike = [(name, number) for number in range(num_rows)], encoded_as or object()
            return Call(self.model, Wanted(DENSE), rows, self._encode, lambda rows: rows, encoded_as=alike)

        return Job(open_call, is_bulk, num_bytes)

    def _encode(self, rows: list[tuple[str, int]]) -> list[Tokens]:
        names = [*dict.fromkeys(name for name, _ in rows)]
        self.steps.append((names[0], rows[0][1], rows[-1][1] + 1))
        self.goes.append(names)
        self.begun.release()
        assert self.gate.wait(PATIENCE_S)
        for name in names:
            self.before_slice(name, rows[0][1])
        return [Tokens(np.array([*name.encode().ljust(LENGTH - 1), number], np.int32)) for name, number in rows]

    def slices_of(self, name: str) -> list[tuple[int, int]]:
        return [
            (start, stop) for one, start, stop in self.steps if one == name and start is not None and stop is not None
        ]


@contextmanager
def running(
    encoder: Encoder, num_threads: int = 1, max_waiting_tokens: int = 1_000_000, max_bulk_wait_s: float = 1e9
) -> Iterator[EncodeThreads]:
    """Encode threads before a backlog that nobody empties, ended at the end."""
    backlog = backlog_of("fake", max_waiting_tokens=max_waiting_tokens)
    encoding = EncodeThreads(backlog, num_threads, max_bulk_wait_s)
    try:
        yield encoding
    finally:
        encoder.gate.set()
        encoding.fail_all(DeviceFailure("the test is over"))
        encoding.close()


def backlog_behind(encoding: EncodeThreads) -> Backlog:
    return encoding._backlog


def hold(encoder: Encoder, encoding: EncodeThreads) -> None:
    """Keep the one encode thread inside a slice, so that what is submitted waits."""
    encoder.gate.clear()
    encoding.submit(encoder.job("held", 1))
    assert encoder.begun.acquire(timeout=PATIENCE_S)
    encoder.steps.clear()
