"""Chooses the lengths of the next batch, for devices that pad to the longest sequence.

A run is a set of sequences that are neighbours in order of length. A batch costs its padded tokens plus a fixed
start-up cost, in tokens; the best run has the largest share of tokens that are not padding. Knows lengths only: the
scheduler knows whose they are and which come first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of one batch, and the cost of starting it."""

    #: Longest x count; one sequence alone may exceed it.
    max_tokens: int
    max_sequences: int
    #: At least 1.
    overhead_tokens: int


def choose_run(buckets: dict[int, int], oldest: int, bounds: Bounds, may_pass_over: bool) -> dict[int, int]:
    """Choose the lengths of the next batch, with their counts, longest last, from the waiting counts in `buckets`.

    At least one of length `oldest` is in it, unless `may_pass_over` and a full batch of other lengths is better.
    """
    waiting = _Waiting(buckets)
    start, end = waiting.best_run(bounds, oldest, may_pass_over)
    run = waiting.lengths_between(start, end)
    must_hold = oldest if run[0] <= oldest <= run[-1] else None
    run = _without_costly_part(run, must_hold, bounds.overhead_tokens)
    lengths, counts = np.unique(run, return_counts=True)
    return dict(zip(lengths.tolist(), counts.tolist(), strict=True))


class _Waiting:
    """The waiting sequences in order of length; a rank is a place in that order, from 0."""

    def __init__(self, buckets: dict[int, int]) -> None:
        lengths = np.fromiter(buckets, np.int64, len(buckets))
        counts = np.fromiter(buckets.values(), np.int64, len(buckets))
        order = np.argsort(lengths)
        #: (num_lengths,) each length that occurs, ascending, and the number of sequences that have it
        self.lengths, self.counts = lengths[order], counts[order]
        #: (num_lengths,) number of sequences up to that length, and their tokens
        self.ends = np.cumsum(self.counts)
        self.tokens = np.cumsum(self.counts * self.lengths)

    def best_run(self, bounds: Bounds, oldest: int, may_pass_over: bool) -> tuple[int, int]:
        """(first rank of the best run, rank behind its last)."""
        # A sequence without tokens takes a row too, and would make the room infinite.
        longest = np.maximum(self.lengths, 1)
        room = np.clip(bounds.max_tokens // longest, 1, bounds.max_sequences)
        # One run per length as its longest: down from there as far as there is room, but with the oldest in it.
        behind_oldest = self.ends[np.searchsorted(self.lengths, oldest)]
        ends = np.minimum(self.ends, behind_oldest - 1 + room)
        is_allowed = self.lengths >= oldest
        if may_pass_over:
            # Only a full batch may come first: while little waits, order of age costs nothing.
            is_full = room <= self.ends
            room, longest = np.tile(room, 2), np.tile(longest, 2)
            ends, is_allowed = np.append(ends, self.ends), np.append(is_allowed, is_full)
        starts = np.maximum(ends - room, 0)
        wanted = self._tokens_before(ends) - self._tokens_before(starts)
        computed = (ends - starts) * longest + bounds.overhead_tokens
        best = np.argmax(np.where(is_allowed, wanted / computed, -1.0))
        return int(starts[best]), int(ends[best])

    def lengths_between(self, start: int, end: int) -> np.ndarray:
        """(end - start,) lengths at ranks `start` to `end`, ascending."""
        counts = np.clip(self.ends, start, end) - np.clip(self.ends - self.counts, start, end)
        return np.repeat(self.lengths, counts)

    def _tokens_before(self, ranks: np.ndarray) -> np.ndarray:
        """For each rank, the tokens of the sequences below it."""
        at = np.searchsorted(self.ends, ranks)
        tokens: np.ndarray = self.tokens[at] - (self.ends[at] - ranks) * self.lengths[at]
        return tokens


def _without_costly_part(run: np.ndarray, must_hold: int | None, overhead_tokens: int) -> np.ndarray:
    """Cut `run` wherever two batches cost less than one, and return the part to run now.

    Without this, three short texts would be padded to the length of one long text that happens to wait with them:
    such a batch is full of tokens, and still slower than one batch for each.
    """
    while len(run) > 1:
        saved = np.arange(1, len(run)) * (run[-1] - run[:-1])
        cut = int(np.argmax(saved)) + 1
        if saved[cut - 1] <= overhead_tokens:
            break
        short, long = run[:cut], run[cut:]
        if must_hold is None:
            run = max(short, long, key=lambda part: part.sum() / (part[-1] * len(part) + overhead_tokens))
        else:
            run = short if must_hold <= short[-1] else long
    return run
