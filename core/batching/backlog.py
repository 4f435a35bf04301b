"""Holds the sequences that wait for the device; encode threads, callers and the device thread share it under one lock.

Adds to the scheduler's policy whatever needs a lock or a clock: equal texts of jobs in flight become one sequence
with several rows, each class has a limit of waiting tokens, and a cancelled job leaves.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from embedq.core.batching.batch_stats import ModelTotals, Totals
from embedq.core.batching.job import Job
from embedq.core.batching.scheduler import Scheduler
from embedq.core.errors import DeviceFailure
from embedq.core.sequence import Key, Sequence, Tokens

#: With this many batches waiting, a few milliseconds of encoding delay cannot idle the device.
_BATCHES_AHEAD = 4


class Encoded(NamedTuple):
    """Token ids of a job's rows from `first_row` on, and the seconds their encoding took."""

    job: Job
    first_row: int
    tokens: list[Tokens]
    seconds: float = 0.0


class Backlog:
    """The waiting sequences of all jobs.

    Thread-safe; wakes the device thread for work and the encode threads for room.
    """

    def __init__(self, scheduler: Scheduler, max_waiting_tokens: int) -> None:
        self._scheduler = scheduler
        self._max_waiting_tokens = max_waiting_tokens
        #: Sequences that wait or are being computed, by everything that decides their rows.
        self._in_flight: dict[Key, dict[Any, Sequence]] = {}
        self.lock = threading.Lock()
        #: Signals work to the device thread, and room to the encode threads.
        self.work = threading.Condition(self.lock)
        self.room = threading.Condition(self.lock)
        self._is_closing = False
        #: Why the device was given up; None while it works.
        self.dead: DeviceFailure | None = None
        #: Called, without the lock, when a batch or a cancelled job has left.
        self.on_room: Callable[[], None] = _nothing

    def add(self, encoded: list[Encoded]) -> None:
        """Queue encoded rows. Once the device is given up, their jobs fail instead."""
        identities = [[_identity(tokens) for tokens in one.tokens] for one in encoded]
        with self.lock:
            if not self.dead:
                for one, of_one in zip(encoded, identities, strict=True):
                    self._add(one, of_one)
                self.work.notify()
        if self.dead:  # without the lock: a callback on the answer may call the engine
            for one in encoded:
                one.job.fail(self.dead)

    def _add(self, encoded: Encoded, identities: list[Any]) -> None:
        job, first_row, all_tokens, seconds = encoded
        job.encoded_s += seconds
        if job.is_over:
            return
        key = (job.call.model.spec.alias, job.call.wanted)
        twins = self._in_flight.setdefault(key, {})
        for row, (tokens, identity) in enumerate(zip(all_tokens, identities, strict=True), first_row):
            job.num_tokens += len(tokens.ids)
            sequence = twins.get(identity)
            if sequence is None:
                sequence = twins[identity] = Sequence(tokens, *key, job.is_bulk, identity)
                self._scheduler.add(sequence)
            elif not job.is_bulk:
                self._scheduler.promote(sequence)
            sequence.rows.append((job, row))
            job.sequences.append(sequence)

    def withdraw(self, job: Job) -> None:
        """Remove `job`'s waiting rows; sequences that only it wanted free their room at once."""
        with self.lock:
            for sequence in dict.fromkeys(job.sequences):  # equal texts of one job are one, and it may have thousands
                sequence.rows = [place for place in sequence.rows if place[0] is not job]
                if not sequence.rows:
                    self._scheduler.remove(sequence)
                    self._forget(sequence)
            job.sequences.clear()
            self.room.notify_all()
        self.on_room()

    def has_room(self, is_bulk: bool) -> bool:
        """Returns True if another job of this class may be encoded. The caller holds the lock."""
        return self._scheduler.num_tokens(is_bulk) < self._max_waiting_tokens

    def is_ahead(self, is_bulk: bool) -> bool:
        """Returns True if several batches of this class wait for the device. The caller holds the lock."""
        return self._scheduler.num_tokens(is_bulk) >= _BATCHES_AHEAD * self.largest_budget

    def num_tokens(self, is_bulk: bool) -> int:
        """Tokens of this class that wait for a batch."""
        return self._scheduler.num_tokens(is_bulk)

    def num_tokens_of(self, model: str) -> int:
        """Tokens of one model that wait for a batch."""
        return self._scheduler.num_tokens_of(model)

    @property
    def largest_budget(self) -> int:
        """The largest budget of tokens that a batch of any model has now."""
        return self._scheduler.largest_budget

    def max_tokens(self, model: str) -> int:
        """Most tokens a batch of `model` may have, however fast the model is."""
        return self._scheduler.max_tokens(model)

    def lower_budget(self, model: str, max_tokens: int) -> None:
        """Limit batches of `model` to `max_tokens` from now on; never raises the budget."""
        with self.lock:
            self._scheduler.lower_budget(model, max_tokens)

    @property
    def has_work(self) -> bool:
        """True while a sequence waits for a batch."""
        return self._scheduler.num_sequences > 0

    def next_batch(self, must_wait: bool) -> list[Sequence]:
        """Take the next batch.

        Empty if nothing waits; with `must_wait`, blocks and returns empty only after `close`.
        """
        with self.lock:
            if must_wait:
                self.work.wait_for(lambda: self._is_closing or self._scheduler.num_sequences)
            batch = self._scheduler.next_batch(time.monotonic())
            if batch:
                self.room.notify_all()
                if self._scheduler.num_sequences:
                    self.work.notify()  # another stream may have gone to sleep before this work came
        if batch:
            self.on_room()
        return batch

    def answered(self, batch: Iterable[Sequence]) -> list[list[tuple[Job, int]]]:
        """Take a computed batch out of flight; returns each sequence's (job, row) pairs.

        No job can join them after this.
        """
        with self.lock:
            answered = []
            for sequence in batch:
                self._forget(sequence)
                answered.append(sequence.rows)
                sequence.rows = []  # a cycle of jobs and sequences would keep both until a garbage collection
        return answered

    def finished(self, model: str, num_padded_tokens: int, seconds: float) -> None:
        """Report a computed batch's seconds to the scheduler."""
        with self.lock:
            self._scheduler.finished(model, num_padded_tokens, seconds)

    @property
    def totals(self) -> Totals:
        """Counts of all batches so far."""
        return self._scheduler.totals

    @property
    def totals_by_model(self) -> dict[str, ModelTotals]:
        """Counts per model, with recent averages and a histogram of batch sizes."""
        return self._scheduler.totals_by_model

    def close(self) -> None:
        """Make the device thread end once nothing waits."""
        with self.lock:
            self._is_closing = True
            self.work.notify_all()

    def fail_all(self, error: DeviceFailure) -> None:
        """Fail every job that has rows here with `error`, and accept no more."""
        with self.lock:
            self.dead, self._is_closing = error, True
            sequences = [sequence for twins in self._in_flight.values() for sequence in twins.values()]
            for sequence in sequences:
                self._scheduler.remove(sequence)
            self._in_flight.clear()
            self.work.notify_all()
            self.room.notify_all()
        for job in {job for sequence in sequences for job, _ in sequence.rows}:
            job.fail(error)

    def _forget(self, sequence: Sequence) -> None:
        twins = self._in_flight.get(sequence.key)
        if twins and twins.get(sequence.identity) is sequence:
            del twins[sequence.identity]
            if not twins:
                del self._in_flight[sequence.key]  # keys come from callers' options, so there may be any number of them


def _identity(tokens: Tokens) -> Any:
    """Equal for two sequences of one key exactly if they have the same rows."""
    types = None if tokens.type_ids is None else tokens.type_ids.tobytes()
    return tokens.ids.tobytes(), types, tokens.num_query_tokens, tokens.num_prompt_tokens


def _nothing() -> None:
    pass
