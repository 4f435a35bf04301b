"""Counts of values by size, cheap enough for every batch and every job: a search and two additions."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate


class Histogram:
    """How many values were at most each of `bounds`. Written by one thread at a time, read by any."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        #: Ascending upper bounds; what is above the last is counted, too.
        self.bounds = bounds
        #: Sum of all values.
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def up_to(self) -> list[int]:
        """How many values were at most each bound, and at the end how many there were at all."""
        return [*accumulate(tuple(self._counts))]
