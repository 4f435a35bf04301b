"""What waits for the device: where encode threads, callers and the device thread meet, under one lock.

Adds to the scheduler's policy what needs a lock or a clock: equal texts of jobs in flight become
one sequence with several rows, a class's room is bounded, a job that nobody wants any more leaves.
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

#: Batches that wait where nothing is lost if what follows them comes some milliseconds later.
_BATCHES_AHEAD = 4


class Encoded(NamedTuple):
    """Rows of a job from `first_row` on, as token ids, and what it took to make them."""

    job: Job
    first_row: int
    tokens: list[Tokens]
    seconds: float = 0.0


class Backlog:
    """The scheduler, what is in flight by its tokens, and who is told of work and of room."""

    def __init__(self, scheduler: Scheduler, max_waiting_tokens: int) -> None:
        self._scheduler = scheduler
        self._max_waiting_tokens = max_waiting_tokens
        #: Sequences that wait or are computed, by all that decides their rows.
        self._in_flight: dict[Key, dict[Any, Sequence]] = {}
        self.lock = threading.Lock()
        #: Signals work to the device thread, and room to the encode threads.
        self.work = threading.Condition(self.lock)
        self.room = threading.Condition(self.lock)
        self._is_closing = False
        #: Why nothing is computed any more; None while all is well.
        self.dead: DeviceFailure | None = None
        #: Called, without the lock, when a batch has left.
        self.on_room: Callable[[], None] = _nothing

    def add(self, encoded: list[Encoded]) -> None:
        """Let rows of jobs wait for a batch."""
        identities = [[_identity(tokens) for tokens in one.tokens] for one in encoded]
        with self.lock:
            if not self.dead:
                for one, of_one in zip(encoded, identities, strict=True):
                    self._add(one, of_one)
                self.work.notify()
        if self.dead:  # without the lock: what a caller attached to the answer may call the engine
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
        """Drop what still waits of `job` alone; its place is free at once."""
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
        """Whether more of this class may be encoded. Its caller holds the lock."""
        return self._scheduler.num_tokens(is_bulk) < self._max_waiting_tokens

    def is_ahead(self, is_bulk: bool) -> bool:
        """Whether the device has enough of this class for several batches. Its caller holds the lock."""
        return self._scheduler.num_tokens(is_bulk) >= _BATCHES_AHEAD * self.largest_budget

    def num_tokens(self, is_bulk: bool) -> int:
        """Tokens of this class that wait for a batch."""
        return self._scheduler.num_tokens(is_bulk)

    def num_tokens_of(self, model: str) -> int:
        """Tokens of one model that wait for a batch."""
        return self._scheduler.num_tokens_of(model)

    @property
    def largest_budget(self) -> int:
        """Tokens of a batch as it would be formed now, of whichever model may have most."""
        return self._scheduler.largest_budget

    def max_tokens(self, model: str) -> int:
        """The most tokens of a batch of `model`, however fast it is."""
        return self._scheduler.max_tokens(model)

    def lower_budget(self, model: str, max_tokens: int) -> None:
        """Let batches of `model` have at most `max_tokens` from now on; never raises the budget."""
        with self.lock:
            self._scheduler.lower_budget(model, max_tokens)

    @property
    def has_work(self) -> bool:
        """Whether anything waits for a batch."""
        return self._scheduler.num_sequences > 0

    def next_batch(self, must_wait: bool) -> list[Sequence]:
        """Take a batch; waits for one if it must. Empty if nothing waits, or at the end."""
        with self.lock:
            if must_wait:
                self.work.wait_for(lambda: self._is_closing or self._scheduler.num_sequences)
            batch = self._scheduler.next_batch(time.monotonic())
            if batch:
                self.room.notify_all()
                if self._scheduler.num_sequences:
                    self.work.notify()  # another stream may sleep since before this work came
        if batch:
            self.on_room()
        return batch

    def answered(self, batch: Iterable[Sequence]) -> list[list[tuple[Job, int]]]:
        """The (job, row) pairs that each sequence answers; no job joins them after this."""
        with self.lock:
            answered = []
            for sequence in batch:
                self._forget(sequence)
                answered.append(sequence.rows)
                sequence.rows = []  # jobs hold their sequences: held both ways, all would wait for a garbage collection
        return answered

    def finished(self, model: str, num_padded_tokens: int, seconds: float) -> None:
        """Tell the scheduler how long a batch took."""
        with self.lock:
            self._scheduler.finished(model, num_padded_tokens, seconds)

    @property
    def totals(self) -> Totals:
        """Counts of all batches so far."""
        return self._scheduler.totals

    @property
    def totals_by_model(self) -> dict[str, ModelTotals]:
        """The same for each model, also of late, and the sizes of its batches."""
        return self._scheduler.totals_by_model

    def close(self) -> None:
        """Let the device thread end once nothing waits."""
        with self.lock:
            self._is_closing = True
            self.work.notify_all()

    def fail_all(self, error: DeviceFailure) -> None:
        """Answer every job that has rows here with `error`, and take no more."""
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
                del self._in_flight[sequence.key]  # keys are options of calls, so their number is not bounded by us


def _identity(tokens: Tokens) -> Any:
    """What two sequences of one key must share to have the same rows."""
    types = None if tokens.type_ids is None else tokens.type_ids.tobytes()
    return tokens.ids.tobytes(), types, tokens.num_query_tokens, tokens.num_prompt_tokens


def _nothing() -> None:
    pass
