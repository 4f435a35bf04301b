"""Statistics of batches: how full and how padded they were, how long their passes took, how fast each model is.

The scheduler updates `Totals` when it forms a batch, the device threads update `Meter` when they compute one. Metrics,
heartbeats and autoscaling read both. Nothing here decides anything.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from embedq.core.batching.job import Job

#: Half-life of a measured speed, in seconds on the device: it follows other texts within a minute of work, and one odd
#: batch does not make it jump.
_HALF_LIFE_S = 10.0

#: Upper bounds of the histogram of batch sizes, in sequences.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

#: Decay factor per batch of the recent averages: about the last fifty batches count.
_DECAY = 0.98


class Histogram:
    """Counts values by upper bound. One thread at a time may write, any may read."""

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        #: Ascending upper bounds; one more bucket counts the values above the last.
        self.bounds = bounds
        #: Sum of all values.
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def up_to(self) -> list[int]:
        """For each bound the number of values up to it, and last the number of all values."""
        return [*accumulate(tuple(self._counts))]


@dataclass(slots=True)
class Totals:
    """Counts over all batches so far."""

    num_batches: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    #: Tokens including padding: what the device computed.
    num_padded_tokens: int = 0
    #: Sum of the budgets of the batches, in tokens.
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
        """Used share of the budgets; a sequence longer than the budget counts in full."""
        return self.num_padded_tokens / self.num_budget_tokens if self.num_budget_tokens else 0.0


@dataclass(slots=True)
class ModelTotals(Totals):
    """Counts over one model's batches, with recent averages and a histogram of batch sizes."""

    #: Sequences of each batch.
    sizes: Histogram = field(default_factory=lambda: Histogram(SIZES))
    _tokens: float = 0.0
    _padded_tokens: float = 0.0
    _budget_tokens: float = 0.0

    def add(self, num_sequences: int, num_tokens: int, num_padded_tokens: int, budget: int) -> None:
        """Count one batch."""
        Totals.add(self, num_sequences, num_tokens, num_padded_tokens, budget)
        self.sizes.add(num_sequences)
        self._tokens = _DECAY * self._tokens + num_tokens
        self._padded_tokens = _DECAY * self._padded_tokens + num_padded_tokens
        self._budget_tokens = _DECAY * self._budget_tokens + budget

    @property
    def late_padding_share(self) -> float:
        """`padding_share` of about the last fifty batches."""
        return 1 - self._tokens / self._padded_tokens if self._padded_tokens else 0.0

    @property
    def late_fill(self) -> float:
        """`fill` of about the last fifty batches."""
        return self._padded_tokens / self._budget_tokens if self._budget_tokens else 0.0


class Batch(NamedTuple):
    """A computed batch, as `Meter.on_batch` reports it."""

    model: str
    num_sequences: int
    num_tokens: int
    #: As `time.monotonic()` counts.
    started_s: float
    ended_s: float
    #: The job of each row it produced; a job appears once per row.
    jobs: list[Job]


@dataclass(slots=True)
class ModelPasses:
    """The passes of one model: their time, tokens, speed and failures."""

    #: Seconds on the device. Passes that run at the same time share the time equally.
    seconds: float = 0.0
    #: Tokens, without padding, of the passes that succeeded.
    num_tokens: int = 0
    #: Batches split because they failed, and those of them that ran out of memory.
    num_splits: int = 0
    num_memory_splits: int = 0
    _num_running: int = 0
    #: Whether the speed counts only batches that began while others waited. Until there was one, it counts any: a
    #: batch of one short text says little about throughput.
    _is_loaded: bool = False
    #: Decayed sums: tokens without padding, and seconds on the device.
    _tokens: float = 0.0
    _seconds: float = 0.0
    _seconds_before: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Throughput while work waits, in tokens without padding per second; 0 before the first batch."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def _add(self, num_tokens: int, is_loaded: bool) -> None:
        self.num_tokens += num_tokens
        seconds, self._seconds_before = self.seconds - self._seconds_before, self.seconds
        if is_loaded and not self._is_loaded:
            self._is_loaded, self._tokens, self._seconds = True, 0.0, 0.0
        if is_loaded != self._is_loaded:
            return
        decay = 0.5 ** (seconds / _HALF_LIFE_S)
        self._tokens = decay * self._tokens + num_tokens
        self._seconds = decay * self._seconds + seconds


class Meter:
    """Measures the passes of all models on one device, over all its streams. Thread-safe."""

    def __init__(self, models: Iterable[str]) -> None:
        self.passes = {alias: ModelPasses() for alias in models}
        #: `time.monotonic()` at the end of the last pass; before the first, at the engine's start.
        self.progressed_s = time.monotonic()
        #: Called with each computed batch before its jobs are answered, on the completion thread. For tracing.
        self.on_batch: Callable[[Batch], None] | None = None
        self._lock = threading.Lock()
        self._changed_s = 0.0
        self._num_running = 0

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one pass ran, up to the last one that began or ended."""
        return sum(passes.seconds for passes in self.passes.values())

    def begin(self, model: str) -> None:
        """Record that a pass of `model` starts."""
        with self._lock:
            self._divide()
            self._num_running += 1
            self.passes[model]._num_running += 1

    def end(self, model: str, num_tokens: int, is_loaded: bool = False) -> None:
        """Record that it ended.

        `num_tokens` excludes padding, 0 if it failed; `is_loaded`: others waited when it began.
        """
        with self._lock:
            self._divide()
            self._num_running -= 1
            passes = self.passes[model]
            passes._num_running -= 1
            passes._add(num_tokens, is_loaded)
            self.progressed_s = self._changed_s

    def split(self, model: str, is_out_of_memory: bool) -> None:
        """Record that a batch of `model` failed and is run again in halves."""
        with self._lock:
            self.passes[model].num_splits += 1
            self.passes[model].num_memory_splits += is_out_of_memory

    def _divide(self) -> None:
        """Divide the time since the last change equally among the passes that ran in it."""
        now_s = time.monotonic()
        if self._num_running:
            part_s = (now_s - self._changed_s) / self._num_running
            for passes in self.passes.values():
                passes.seconds += part_s * passes._num_running
        self._changed_s = now_s
