"""Many jobs' sequences -> the next batch. Pure policy: no threads, no clock, no tensors.

A batch is whatever waits when the device becomes free, up to a budget of tokens counted after
padding. It is built around the sequence that has waited longest in its class, by adding the
sequences nearest to it in length: the oldest is always in the next batch of its class, and what
joins it costs little padding.

Two classes: interactive goes before bulk, unless bulk has waited longer than `max_wait_s`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import Any

from core.sequence import Sequence

#: Celery's Redis priorities 0..9, 0 first: up to this one a job counts as interactive.
MAX_INTERACTIVE_PRIORITY = 4


class _Class:
    """The waiting sequences of one key and one class, by age and by length."""

    def __init__(self) -> None:
        self.by_age: deque[Sequence] = deque()
        self.by_length: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.by_age.append(sequence)
        insort(self.by_length, sequence, key=_length)

    def oldest(self) -> Sequence | None:
        while self.by_age and self.by_age[0].is_taken:
            self.by_age.popleft()
        return self.by_age[0] if self.by_age else None

    def take(self, anchor: Sequence, max_tokens: int, max_sequences: int) -> list[Sequence]:
        """Remove and return the run of lengths around `anchor` that the budget allows."""
        start = self._index(anchor)
        end = start + 1
        while end - start < max_sequences:
            below = self.by_length[start - 1] if start > 0 else None
            above = self.by_length[end] if end < len(self.by_length) else None
            longest = self.by_length[end - 1].length
            if below and (not above or anchor.length - below.length <= above.length - anchor.length):
                above = None
            else:
                below, longest = None, above.length if above else 0
            if not (below or above) or longest * (end - start + 1) > max_tokens:
                break
            start, end = (start - 1, end) if below else (start, end + 1)
        batch = self.by_length[start:end]
        del self.by_length[start:end]
        for sequence in batch:
            sequence.is_taken = True
        return batch

    def _index(self, sequence: Sequence) -> int:
        index = bisect_left(self.by_length, sequence.length, key=_length)
        while self.by_length[index] is not sequence:
            index += 1
        return index


class Scheduler:
    """Which sequences run next. Not thread-safe: its caller holds a lock."""

    def __init__(self, max_batch_tokens: int, max_batch_sequences: int, max_wait_s: float) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_sequences = max_batch_sequences
        self.max_wait_s = max_wait_s
        #: Tokens of all waiting sequences, without padding.
        self.num_tokens = 0
        self.num_sequences = 0
        self._classes: dict[tuple[bool, Any], _Class] = {}

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Let `sequences` wait for a batch."""
        for sequence in sequences:
            is_bulk = sequence.priority > MAX_INTERACTIVE_PRIORITY
            self._classes.setdefault((is_bulk, sequence.key), _Class()).add(sequence)
            self.num_tokens += sequence.length
            self.num_sequences += 1

    def next_batch(self, now_s: float) -> list[Sequence]:
        """Take the next batch; empty if nothing waits.

        longest x count <= max_batch_tokens, except for one sequence that alone exceeds it.
        """
        heads = [
            (is_bulk, oldest, waiting)
            for (is_bulk, _), waiting in self._classes.items()
            if (oldest := waiting.oldest())
        ]
        if not heads:
            self._classes.clear()  # keys are options of calls, so their number is not bounded by us
            return []
        _, anchor, waiting = min(heads, key=lambda head: self._urgency(head[0], head[1], now_s))
        batch = waiting.take(anchor, self.max_batch_tokens, self.max_batch_sequences)
        self.num_tokens -= sum(map(_length, batch))
        self.num_sequences -= len(batch)
        return batch

    def remove(self, job: Any) -> None:
        """Drop what still waits of `job`; its place is free at once."""
        for waiting in self._classes.values():
            dropped = [sequence for sequence in waiting.by_length if sequence.job is job]
            if not dropped:
                continue
            waiting.by_length = [sequence for sequence in waiting.by_length if sequence.job is not job]
            for sequence in dropped:
                sequence.is_taken = True
            self.num_tokens -= sum(map(_length, dropped))
            self.num_sequences -= len(dropped)

    def _urgency(self, is_bulk: bool, oldest: Sequence, now_s: float) -> tuple[bool, float]:
        """Smallest first: overdue bulk counts as interactive, and within a class age decides."""
        is_overdue = now_s - oldest.arrived_s > self.max_wait_s
        return is_bulk and not is_overdue, oldest.arrived_s


def _length(sequence: Sequence) -> int:
    return sequence.length
