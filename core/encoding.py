"""Jobs -> token ids, on threads of their own: ahead of the device, never ahead of memory.

Interactive jobs first; of a class the oldest first, slice by slice, several threads at one large
job. A class whose waiting tokens fill their room is not encoded further until batches have left.
"""

from __future__ import annotations

import threading
from collections import deque

from core.backlog import Backlog
from core.errors import DeviceFailure, EmbedqError
from core.job import Job
from core.sequence import Tokens

#: What a slice still weighs after each further one, in what is learned of bytes and tokens.
_DECAY = 0.98


class EncodeThreads:
    """Open and encode jobs, and hand their sequences to the backlog."""

    def __init__(self, backlog: Backlog, num_threads: int) -> None:
        self._backlog = backlog
        self._queues: dict[bool, deque[Job]] = {False: deque(), True: deque()}
        self._num_bytes = {False: 0, True: 0}
        #: Decayed sums over the slices encoded so far: bytes of their jobs, and the tokens they became.
        self._learned_bytes, self._learned_tokens = 8.0, 1.0
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._run, name=f"encode-{index}", daemon=True) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Let `job` be encoded; returns at once. DeviceFailure once the engine is closed or dead."""
        with self._backlog.lock:
            if self._backlog.dead:
                raise self._backlog.dead
            if self._is_closing:
                raise DeviceFailure("the engine is closed; no new work is taken")
            self._queues[job.is_bulk].append(job)
            self._num_bytes[job.is_bulk] += job.num_bytes
            self._backlog.room.notify()

    @property
    def bytes_per_token(self) -> float:
        """What a token takes of a job's `num_bytes`, as seen lately."""
        return self._learned_bytes / self._learned_tokens

    def num_tokens(self, is_bulk: bool) -> int:
        """Tokens that the jobs which wait here will have, as far as their bytes tell."""
        return int(self._num_bytes[is_bulk] / self.bytes_per_token)

    def close(self) -> None:
        """Encode what waits, then end the threads."""
        with self._backlog.lock:
            self._is_closing = True
            self._backlog.room.notify_all()
        for thread in self._threads:
            thread.join()

    def fail_all(self, error: EmbedqError) -> None:
        """Answer every job that waits here with `error`."""
        with self._backlog.lock:
            jobs = [job for queue in self._queues.values() for job in queue]
            for is_bulk, queue in self._queues.items():
                queue.clear()
                self._num_bytes[is_bulk] = 0
            self._is_closing = True
            self._backlog.room.notify_all()
        for job in jobs:
            job.fail(error)

    def _run(self) -> None:
        while taken := self._take():
            job, rows = taken
            try:
                if rows is None:
                    job.open()
                    rows = self._first_slice(job)
                if rows.start < rows.stop and not job.is_over:
                    encoded = job.call.encode(rows)
                    self._learn(job, encoded)
                    self._backlog.add(job, rows.start, encoded)
            except Exception as error:
                job.fail(error)
                self._backlog.withdraw(job)

    def _learn(self, job: Job, encoded: list[Tokens]) -> None:
        if job.num_bytes:
            num_tokens = sum(len(tokens.ids) for tokens in encoded)
            self._learned_bytes = _DECAY * self._learned_bytes + job.num_bytes * len(encoded) / job.call.num_rows
            self._learned_tokens = _DECAY * self._learned_tokens + num_tokens

    def _take(self) -> tuple[Job, slice | None] | None:
        """Wait for work: (a job, its next rows), (a job to open, None), or None at the end."""
        with self._backlog.lock:
            while True:
                is_bulk = self._next_class()
                if is_bulk is not None:
                    job = self._queues[is_bulk][0]
                    if not job.is_opened:
                        self._pop(is_bulk)  # nobody else may open it
                        return job, None
                    rows = job.take_slice()
                    if rows.stop >= job.call.num_rows:
                        self._pop(is_bulk)
                    return job, rows
                if self._is_closing and not any(self._queues.values()):
                    self._backlog.room.notify_all()  # the others may end, too
                    return None
                self._backlog.room.wait()

    def _next_class(self) -> bool | None:
        """The class whose first job is encoded next; None if nothing waits or nothing has room."""
        for is_bulk, queue in self._queues.items():
            while queue and queue[0].is_over:
                self._pop(is_bulk)  # cancelled or failed: the rest need not be encoded
            if queue and self._backlog.has_room(is_bulk):
                return is_bulk
        return None

    def _pop(self, is_bulk: bool) -> None:
        self._num_bytes[is_bulk] -= self._queues[is_bulk].popleft().num_bytes

    def _first_slice(self, job: Job) -> slice:
        """The first rows of a job just opened; what is left of it goes back to the front of its class."""
        with self._backlog.lock:
            rows = job.take_slice()
            if rows.stop < job.call.num_rows:
                self._queues[job.is_bulk].appendleft(job)
                self._num_bytes[job.is_bulk] += job.num_bytes
                self._backlog.room.notify()
            return rows
