"""Threads that encode jobs into token ids, ahead of the device and within a bound of memory.

Interactive jobs come first, and within a class the oldest; bulk that was passed over for `max_bulk_wait_s` gets one turn:
a slice, or as many small jobs as are encoded together. Several threads may encode slices of one large job. Small
jobs are encoded together; while enough batches wait for the device, they are held for a moment so that more can join.
A class whose waiting tokens reach the limit is encoded further only after batches have left.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from itertools import groupby, islice
from typing import Any, NamedTuple

from embedq.core.batching.backlog import Backlog, Encoded
from embedq.core.batching.bulk_share import BulkShare
from embedq.core.batching.job import Job
from embedq.core.errors import DeviceFailure, EmbedqError, InvalidInput
from embedq.core.guarded_thread import GuardedThread
from embedq.core.sequence import Tokens

#: Most bytes of small jobs that one thread encodes together: a dozen jobs of one text, whose locks and wake-ups cost
#: as much as their encoding. Few enough that an idle device waits a millisecond for them.
_MAX_BYTES_TOGETHER = 16_384

#: Longest that small jobs are held for others to join, while enough batches wait for the device. Releasing the
#: interpreter lock for one text and taking it back from busy threads costs several times the encoding.
_GATHERING_S = 0.02

#: Times that a thread which ends unexpectedly is started again. Each time its jobs fail; an error that always comes
#: back would fail every job there is.
_MAX_RESTARTS = 3

#: Decay factor per slice of the sums that estimate bytes per token.
_DECAY = 0.98


class _Part(NamedTuple):
    """Rows of an opened job to encode."""

    job: Job
    rows: slice


class EncodeThreads:
    """Opens and encodes jobs, and adds their sequences to the backlog."""

    def __init__(
        self,
        backlog: Backlog,
        num_threads: int,
        max_bulk_wait_s: float,
        on_broken: Callable[[str], None] | None = None,
    ) -> None:
        """`on_broken` is called with the reason if a thread ends again and again and is not restarted any more."""
        self._backlog = backlog
        self._bulk_share = BulkShare(max_bulk_wait_s)
        #: By class, oldest first; a dict, so that removing one of thousands needs no search.
        self._queues: dict[bool, OrderedDict[Job, None]] = {False: OrderedDict(), True: OrderedDict()}
        self._num_bytes = {False: 0, True: 0}
        #: Decayed sums over the slices encoded so far: their bytes and their tokens.
        self._learned_bytes, self._learned_tokens = 8.0, 1.0
        self._is_closing = False
        self._threads = [
            GuardedThread(f"encode-{index}", self._run, on_broken, _MAX_RESTARTS) for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        """True while all threads run, and after `close`; False once one ended unexpectedly and is not restarted."""
        return not any(thread.is_broken for thread in self._threads)

    def submit(self, job: Job) -> None:
        """Queue `job` for encoding; returns at once.

        DeviceFailure once the engine is closed or its device is given up.
        """
        with self._backlog.lock:
            if self._backlog.dead:
                raise self._backlog.dead
            if self._is_closing:
                raise DeviceFailure("the engine is closed; it accepts no new jobs")
            self._put(job)

    def withdraw(self, job: Job) -> None:
        """Remove `job` if it still waits here."""
        with self._backlog.lock:
            if job in self._queues[job.is_bulk]:
                self._drop(job)

    def num_bytes(self, is_bulk: bool) -> int:
        """Bytes of the jobs that wait for encoding, wholly or in part."""
        return self._num_bytes[is_bulk]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, as a recent average."""
        return self._learned_bytes / self._learned_tokens

    def num_tokens(self, is_bulk: bool) -> int:
        """Tokens of the jobs that wait for encoding, estimated from their bytes."""
        return int(self._num_bytes[is_bulk] / self.bytes_per_token)

    def close(self) -> None:
        """Encode what is queued, then end the threads."""
        with self._backlog.lock:
            self._is_closing = True
            self._backlog.room.notify_all()
        for thread in self._threads:
            thread.join()

    def fail_all(self, error: EmbedqError) -> None:
        """Fail every job that waits here with `error`."""
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
            try:
                self._add([part for job, rows in taken if (part := self._opened(job, rows))])
            except BaseException as error:  # a bug here: these jobs are in no queue, and would wait for ever
                failure = DeviceFailure(f"encoding failed unexpectedly with {type(error).__name__}")
                for job, _ in taken:  # not the producer's fault: a queue tries them again
                    self._fail(job, failure)
                raise

    def _add(self, parts: list[_Part]) -> None:
        """Encode opened rows and add them to the backlog."""
        encoded = [one for _, alike in groupby(parts, _encoded_as) for one in self._encode([*alike])]
        if not encoded:
            return
        try:
            self._backlog.add(encoded)
        except Exception as error:  # a bug here must not end this thread
            for one in encoded:
                self._fail(one.job, error)

    def _opened(self, job: Job, rows: slice | None) -> _Part | None:
        """A job's next rows, opening it first if needed; None if the job is over, cancelled or failed to open."""
        try:
            if rows is None:
                was_bulk = job.is_bulk
                job.open()
                rows = self._first_slice(job, was_bulk)
        except BaseException as error:
            self._fail(job, error)
            return None
        return None if rows.start >= rows.stop or job.is_over else _Part(job, rows)

    def _encode(self, parts: list[_Part]) -> list[Encoded]:
        """Encode rows of jobs with equal `encoded_as` in one call, because a call costs as much as a small job."""
        begun_s = time.monotonic()
        rows = [row for part in parts for row in part.job.call.rows[part.rows]]
        try:
            tokens = parts[0].job.call.encode(rows)
            assert len(tokens) == len(rows), "a model's encoding lost rows"
        except BaseException as error:
            if len(parts) > 1:  # encoding each alone shows whose text raises
                return [one for part in parts for one in self._encode([part])]
            self._fail(parts[0].job, error)
            return []
        seconds_each, left = (time.monotonic() - begun_s) / len(rows), iter(tokens)
        encoded = []
        for job, part in parts:
            own = [*islice(left, part.stop - part.start)]
            self._learn(job, own)
            encoded.append(Encoded(job, part.start, own, seconds_each * len(own)))
        return encoded

    def _fail(self, job: Job, error: BaseException) -> None:
        # A panic of the tokenizer's Rust code is no Exception; raised from `.result()`, it would end the caller's
        # thread.
        if not isinstance(error, Exception):
            error = InvalidInput(f"a text of this job breaks the tokenizer: {type(error).__name__}")
        job.fail(error)
        self._backlog.withdraw(job)

    def _learn(self, job: Job, encoded: list[Tokens]) -> None:
        if job.num_bytes:
            num_tokens = sum(len(tokens.ids) for tokens in encoded)
            self._learned_bytes = _DECAY * self._learned_bytes + job.num_bytes * len(encoded) / job.call.num_rows
            self._learned_tokens = _DECAY * self._learned_tokens + num_tokens

    def _take(self) -> list[tuple[Job, slice | None]]:
        """Wait for work: one (job, next rows), or several (unopened job, None); empty once closed and done."""
        with self._backlog.lock:
            while True:
                is_bulk = self._next_class()
                if is_bulk is not None:
                    job = next(iter(self._queues[is_bulk]))
                    if not job.is_opened:
                        return self._take_unopened(self._queues[is_bulk])
                    rows = job.take_slice()
                    if rows.stop >= job.call.num_rows:
                        self._drop(job)
                    return [(job, rows)]
                if self._is_closing and not any(self._queues.values()):
                    self._backlog.room.notify_all()  # the others may end, too
                    return []
                self._backlog.room.wait(self._next_look_s())

    def _take_unopened(self, queue: OrderedDict[Job, None]) -> list[tuple[Job, slice | None]]:
        """Take the first job of a queue and the small ones behind it, for this thread alone to open."""
        taken: list[tuple[Job, slice | None]] = []
        left_bytes = _MAX_BYTES_TOGETHER
        while queue and left_bytes > 0:
            job = next(iter(queue))
            if taken and (job.is_opened or not 0 < job.num_bytes <= left_bytes):
                break
            self._drop(job)
            taken.append((job, None))
            left_bytes -= job.num_bytes or left_bytes  # a job of unknown size may be large
        return taken

    def _next_class(self) -> bool | None:
        """The class to encode next; None if nothing waits, no class has room, or small jobs are being held."""
        for queue in self._queues.values():
            while queue and (job := next(iter(queue))).is_over:
                self._drop(job)  # cancelled or failed: the rest need not be encoded
        ready = [is_bulk for is_bulk in self._queues if self._can_go(is_bulk)]
        if len(ready) == 2 and not self._bulk_share.is_due(time.monotonic()):
            return False
        self._bulk_share.restart()
        return ready[-1] if ready else None

    def _can_go(self, is_bulk: bool) -> bool:
        """Returns True if the next job of a class may be encoded now."""
        return bool(self._queues[is_bulk]) and self._backlog.has_room(is_bulk) and not self._gathering_s(is_bulk)

    def _next_look_s(self) -> float | None:
        """Seconds until held jobs are due; None if only a new job or new room can change anything."""
        gathering = (is_bulk for is_bulk, queue in self._queues.items() if queue and self._backlog.has_room(is_bulk))
        return min(map(self._gathering_s, gathering), default=None)

    def _gathering_s(self, is_bulk: bool) -> float:
        """Returns the seconds for which small jobs are still held so that others can be encoded with them.

        0 if the first may be large or the device is about to run dry.
        """
        first = next(iter(self._queues[is_bulk]))
        if (
            first.is_opened
            or not first.num_bytes
            or self._num_bytes[is_bulk] >= _MAX_BYTES_TOGETHER
            or self._is_closing
            or not self._backlog.is_ahead(is_bulk)
        ):
            return 0.0
        return max(0.0, first.submitted_s + _GATHERING_S - time.monotonic())

    def _put(self, job: Job) -> None:
        queue = self._queues[job.is_bulk]
        queue[job] = None
        self._num_bytes[job.is_bulk] += job.num_bytes
        # Also for the first of held jobs: a thread must wait until they are due.
        if len(queue) == 1 or not self._gathering_s(job.is_bulk):
            self._backlog.room.notify()

    def _drop(self, job: Job) -> None:
        del self._queues[job.is_bulk][job]
        self._num_bytes[job.is_bulk] -= job.num_bytes

    def _first_slice(self, job: Job, was_bulk: bool) -> slice:
        """The first rows of a job just opened. The rest goes back to the front, or to the end of its new class."""
        rows = job.take_slice()  # without the lock: no other thread sees a job that is in no queue
        if rows.stop < job.call.num_rows and not job.is_over:
            with self._backlog.lock:
                self._put(job)
                if job.is_bulk == was_bulk:
                    self._queues[was_bulk].move_to_end(job, last=False)
        return rows


def _encoded_as(part: _Part) -> Any:
    return part.job.call.encoded_as
