"""Statistics of batches: how full and how padded they were, and how many seconds and tokens their passes took.

The scheduler writes `Totals` as it forms a batch, the device threads write `Meter` as they compute one; metrics,
heartbeats and scaling read both. Nothing here decides anything.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from embedq.core.batching.decayed_mean import DecayedMean

if TYPE_CHECKING:
    from embedq.core.batching.job import Job

#: Sequences of a batch, as its histogram tells them apart.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

#: Batches after which one counts half in the shares of late: the last fifty or so count.
_HALF_LIFE_BATCHES = 34.0


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


@dataclass(slots=True)
class Totals:
    """Of all batches so far."""

    num_batches: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    #: The same with padding: what the device computed.
    num_padded_tokens: int = 0
    #: What the batches might have had.
    num_budget_tokens: int = 0

    def add(self, num_sequences: int, num_tokens: int, num_padded_tokens: int, budget: int) -> None:
        """Count one batch."""
        self.num_batches += 1
        self.num_sequences += num_sequences
        self.num_tokens += num_tokens
        self.num_padded_tokens += num_padded_tokens
        self.num_budget_tokens += budget

    @property
    def padding_share(self) -> float:
        return 1 - self.num_tokens / self.num_padded_tokens if self.num_padded_tokens else 0.0

    @property
    def fill(self) -> float:
        """Share of the budgets that was used; sequences longer than the budget count in full."""
        return self.num_padded_tokens / self.num_budget_tokens if self.num_budget_tokens else 0.0


@dataclass(slots=True)
class ModelTotals(Totals):
    """Of one model's batches: also of the last ones, and how large they were."""

    #: Sequences of each batch.
    sizes: Histogram = field(default_factory=lambda: Histogram(SIZES))
    _fill: DecayedMean = field(default_factory=lambda: DecayedMean(_HALF_LIFE_BATCHES))
    _unpadded_share: DecayedMean = field(default_factory=lambda: DecayedMean(_HALF_LIFE_BATCHES))

    def add(self, num_sequences: int, num_tokens: int, num_padded_tokens: int, budget: int) -> None:
        """Count one batch."""
        Totals.add(self, num_sequences, num_tokens, num_padded_tokens, budget)
        self.sizes.add(num_sequences)
        self._fill.add(num_padded_tokens, weight=budget)
        self._unpadded_share.add(num_tokens, weight=num_padded_tokens)

    @property
    def late_padding_share(self) -> float:
        """`padding_share` of the last batches."""
        return 1 - self._unpadded_share.mean if self._unpadded_share.weight else 0.0

    @property
    def late_fill(self) -> float:
        """`fill` of the last batches."""
        return self._fill.mean


class Batch(NamedTuple):
    """A batch that was computed."""

    model: str
    num_sequences: int
    num_tokens: int
    #: As `time.monotonic()` counts.
    started_s: float
    ended_s: float
    #: Whose rows it made; a job stands here once for each of them.
    jobs: list[Job]


@dataclass(slots=True)
class Passes:
    """Of one model."""

    #: Seconds of the device. While several passes are under way, each has its part of them.
    seconds: float = 0.0
    #: Tokens without padding of the passes that ended and did not fail.
    num_tokens: int = 0
    #: Passes that left others waiting as they began: how fast many texts are computed shows in these alone.
    num_loaded: int = 0
    #: Batches halved because they failed, and those of them for which the memory was too small.
    num_splits: int = 0
    num_memory_splits: int = 0
    _num_running: int = 0


class Meter:
    """The passes of all models on one device, over all of its streams. Thread-safe."""

    def __init__(self, models: Iterable[str]) -> None:
        self.passes = {alias: Passes() for alias in models}
        #: When a pass last ended, as `time.monotonic()` counts; at first, when the engine was made.
        self.progressed_s = time.monotonic()
        #: Told of each computed batch before its jobs are answered, on the completion thread. For tracing.
        self.on_batch: Callable[[Batch], None] | None = None
        self._lock = threading.Lock()
        self._changed_s = 0.0
        self._num_running = 0

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one pass was under way, up to the last one that began or ended."""
        return sum(passes.seconds for passes in self.passes.values())

    def begin(self, model: str) -> None:
        """A pass of `model` goes to the device."""
        with self._lock:
            self._divide()
            self._num_running += 1
            self.passes[model]._num_running += 1

    def end(self, model: str, num_tokens: int, is_loaded: bool = False) -> None:
        """It is over; of `num_tokens` without padding, 0 if it failed. `is_loaded`: as it began, more waited."""
        with self._lock:
            self._divide()
            self._num_running -= 1
            passes = self.passes[model]
            passes._num_running -= 1
            passes.num_tokens += num_tokens
            passes.num_loaded += is_loaded
            self.progressed_s = self._changed_s

    def split(self, model: str, is_out_of_memory: bool) -> None:
        """A batch of `model` failed, and is run again in halves."""
        with self._lock:
            self.passes[model].num_splits += 1
            self.passes[model].num_memory_splits += is_out_of_memory

    def _divide(self) -> None:
        """Give the time since the last change to the passes that ran in it, to each the same part."""
        now_s = time.monotonic()
        if self._num_running:
            part_s = (now_s - self._changed_s) / self._num_running
            for passes in self.passes.values():
                passes.seconds += part_s * passes._num_running
        self._changed_s = now_s
