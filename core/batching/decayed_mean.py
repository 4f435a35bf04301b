"""A mean in which what was added lately counts most: of sizes, shares and speeds that change with what is sent."""

from __future__ import annotations


class DecayedMean:
    """Sum of values over sum of weights, both halved after each further `half_life` that is added.

    Written by one thread at a time, read by any.
    """

    __slots__ = ("_half_life", "_sums")

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        #: Sum of values and sum of weights, in one: who reads meanwhile never sees one without the other.
        self._sums = 0.0, 0.0

    def add(self, value: float, weight: float = 1.0, age: float = 1.0) -> None:
        """Add `value`, a sum over `weight`; everything before is older by `age`, in the unit of the half-life."""
        kept = 0.5 ** (age / self._half_life)
        values, weights = self._sums
        self._sums = kept * values + value, kept * weights + weight

    @property
    def weight(self) -> float:
        """The decayed sum of all weights; 0 before anything was added."""
        return self._sums[1]

    @property
    def mean(self) -> float:
        """0 before anything was added."""
        values, weights = self._sums
        return values / weights if weights else 0.0
