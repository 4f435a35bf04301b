"""Waiting sequences -> the next batch. Pure policy: no threads, no clock, no tensors.

A batch is whatever waits when the device becomes free, up to a budget of tokens, padding included
where the model pads, and no more than the device computes in a stated time.

- Who goes first: interactive before bulk. Bulk that interactive work was preferred to for
  `max_bulk_wait_s` gets one batch, then interactive work is first again: a bulk job of an hour takes
  one batch now and then from others, however long it has waited.
- Within a class the oldest, by the order of adding, decides which model and what is wanted.
- Among its like, the lengths that make best use of the device (`core.batching.length_runs`). The oldest interactive one is
  always with them; before the oldest bulk one at most one batch goes, for at 16 batches' worth waiting that
  makes 1 to 2 % more throughput. So one that has `n` older ones in its class leaves with one of the class's
  next `n + 1` batches, `2 * (n + 1)` if it is bulk.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from embedq.core.batching.batch_stats import ModelTotals, Totals
from embedq.core.batching.length_runs import Bounds, choose_run
from embedq.core.sequence import Sequence, Wanted, num_computed_tokens

#: Tokens a batch may have however slow the device was measured: below it, what starting a batch costs outweighs
#: the batch, and one slow pass (a first one, say) would keep batches too small to measure anything better.
MIN_BATCH_TOKENS = 256

#: What a measurement still weighs after each further batch: speed is that of about the last ten.
DECAY_PER_BATCH = 0.9


@dataclass(slots=True)
class Limits:
    """What a batch of one model may be."""

    #: Tokens of a batch; a longer sequence runs alone.
    max_batch_tokens: int
    max_batch_sequences: int
    #: What starting a batch costs, in tokens of compute, at least 1: more makes batches fuller, less makes them
    #: less padded.
    overhead_tokens: int
    #: Whether all of a batch are as long as its longest: tokens are then longest x count, else the sum.
    is_padded: bool = True
    #: Whether batches are of like lengths though nothing is padded. What is padded always has such.
    has_like_lengths: bool = False

    @property
    def is_by_length(self) -> bool:
        """Whether lengths decide what shares a batch; where not, age alone does."""
        return self.is_padded or self.has_like_lengths


class Scheduler:
    """Which sequences run next. Not thread-safe: its caller holds a lock."""

    def __init__(self, limits: Mapping[str, Limits], max_batch_s: float, max_bulk_wait_s: float) -> None:
        """`limits` are by model alias; `max_batch_s` bounds a batch once the model's speed is known."""
        #: What was put into batches, by model.
        self.totals_by_model = {model: ModelTotals() for model in limits}
        self._max_batch_s = max_batch_s
        self._max_bulk_wait_s = max_bulk_wait_s
        self._limits = {model: replace(given) for model, given in limits.items()}
        self._speeds = {model: _Speed() for model in limits}
        self._interactive, self._bulk = _Class(may_pass_over=False), _Class(may_pass_over=True)
        #: When interactive work was first preferred to bulk that waits; None while it is not.
        self._passed_over_s: float | None = None

    @property
    def num_sequences(self) -> int:
        """How many wait."""
        return len(self._interactive) + len(self._bulk)

    @property
    def totals(self) -> Totals:
        """What was put into batches, of all models."""
        each = self.totals_by_model.values()
        return Totals(
            sum(one.num_batches for one in each),
            sum(one.num_sequences for one in each),
            sum(one.num_tokens for one in each),
            sum(one.num_padded_tokens for one in each),
            sum(one.num_budget_tokens for one in each),
        )

    def num_tokens(self, is_bulk: bool) -> int:
        """Tokens that wait in one class, without padding."""
        return self._class(is_bulk).by_model.total()

    def num_tokens_of(self, model: str) -> int:
        """Tokens that wait for one model, without padding."""
        return self._interactive.by_model[model] + self._bulk.by_model[model]

    def add(self, sequence: Sequence) -> None:
        """Let `sequence` wait for a batch."""
        self._class(sequence.is_bulk).add(sequence, self._bucket(sequence))

    def remove(self, sequence: Sequence) -> None:
        """Drop `sequence` if it still waits; its place is free at once."""
        self._class(sequence.is_bulk).remove(sequence, self._bucket(sequence))

    def promote(self, sequence: Sequence) -> None:
        """Make a waiting bulk sequence the newest of the interactive ones; anything else stays what it is."""
        if self._bulk.remove(sequence, self._bucket(sequence)):
            sequence.is_bulk = False
            self.add(sequence)

    def next_batch(self, now_s: float) -> list[Sequence]:
        """Take the next batch; empty if nothing waits.

        All have one key and one class; their tokens are within `budget`, except for one sequence that alone exceeds it.
        """
        waiting = self._next_class(now_s)
        if not len(waiting):
            return []
        model = waiting.oldest.model
        limits, budget = self._limits[model], self.budget(model)
        bounds = Bounds(budget, limits.max_batch_sequences, limits.overhead_tokens)
        batch = waiting.take_run(bounds) if limits.is_by_length else waiting.take_oldest(bounds)
        self._count(batch, limits.is_padded, budget)
        return batch

    def budget(self, model: str) -> int:
        """Tokens a batch of `model` may have now. The same for both classes: whichever runs, the other waits for it."""
        max_tokens, speed = self._limits[model].max_batch_tokens, self._speeds[model]
        if speed.seconds <= 0:
            return max_tokens
        in_time = self._max_batch_s * speed.num_tokens / speed.seconds
        return int(min(max_tokens, max(MIN_BATCH_TOKENS, in_time)))

    def max_tokens(self, model: str) -> int:
        """Tokens a batch of `model` may have however fast it is."""
        return self._limits[model].max_batch_tokens

    @property
    def largest_budget(self) -> int:
        """Tokens a batch may have now, of whichever model may have most."""
        return max(map(self.budget, self._limits), default=0)

    def finished(self, model: str, num_tokens_padded: int, seconds: float) -> None:
        """Learn the speed of `model` from a batch that the device computed in `seconds`."""
        self._speeds[model].add(num_tokens_padded, seconds)

    def lower_budget(self, model: str, max_tokens: int) -> None:
        """Let batches of `model` have at most `max_tokens` from now on; never raises the budget."""
        limits = self._limits[model]
        limits.max_batch_tokens = min(limits.max_batch_tokens, max_tokens)

    def _class(self, is_bulk: bool) -> _Class:
        return self._bulk if is_bulk else self._interactive

    def _bucket(self, sequence: Sequence) -> int:
        """Where length does not matter to the device, all are in one bucket, in order of age."""
        return sequence.length if self._limits[sequence.model].is_by_length else 0

    def _next_class(self, now_s: float) -> _Class:
        if len(self._bulk) and len(self._interactive):
            if self._passed_over_s is None:
                self._passed_over_s = now_s
                return self._interactive
            if now_s - self._passed_over_s < self._max_bulk_wait_s:
                return self._interactive
        # From here on bulk has its turn, or does not wait: either way nothing is preferred to it.
        self._passed_over_s = None
        return self._bulk if len(self._bulk) else self._interactive

    def _count(self, batch: list[Sequence], is_padded: bool, budget: int) -> None:
        num_tokens = sum(sequence.length for sequence in batch)
        num_computed = num_computed_tokens(batch, is_padded)
        self.totals_by_model[batch[0].model].add(len(batch), num_tokens, num_computed, budget)


class _Speed:
    """Tokens over seconds of the last batches; sums, so that a small batch weighs little."""

    def __init__(self) -> None:
        self.num_tokens = 0.0
        self.seconds = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        self.num_tokens = self.num_tokens * DECAY_PER_BATCH + num_tokens
        self.seconds = self.seconds * DECAY_PER_BATCH + seconds


#: Sequences in the order they were added; taking the first and dropping any one take the same time however many wait.
_Queue = OrderedDict[Sequence, None]


class _Class:
    """The waiting sequences of one class: all by age, and those of each key by length and then by age."""

    def __init__(self, may_pass_over: bool) -> None:
        #: Tokens without padding, by model.
        self.by_model: Counter[str] = Counter()
        self._may_pass_over = may_pass_over
        self._by_age: _Queue = OrderedDict()
        self._by_key: dict[tuple[str, Wanted], dict[int, _Queue]] = {}
        #: Whether the last batch went before the oldest. The next one may not.
        self._is_passed_over = False

    def __len__(self) -> int:
        return len(self._by_age)

    @property
    def oldest(self) -> Sequence:
        return next(iter(self._by_age))

    def add(self, sequence: Sequence, bucket: int) -> None:
        buckets = self._by_key.setdefault(sequence.key, {})
        if bucket not in buckets:
            buckets[bucket] = OrderedDict()
        buckets[bucket][sequence] = self._by_age[sequence] = None
        self.by_model[sequence.model] += sequence.length

    def remove(self, sequence: Sequence, bucket: int) -> bool:
        """Whether it waited here."""
        if sequence not in self._by_age:
            return False
        buckets = self._by_key[sequence.key]
        del buckets[bucket][sequence]
        self._forget(sequence, buckets, bucket)
        return True

    def take_run(self, bounds: Bounds) -> list[Sequence]:
        """Remove and return the run of lengths that makes best use of the device, of each length the oldest."""
        oldest = self.oldest
        buckets = self._by_key[oldest.key]
        counts = {length: len(queue) for length, queue in buckets.items()}
        run = choose_run(counts, oldest.length, bounds, self._may_pass_over and not self._is_passed_over)
        # The oldest of all is the first of its length, so it is taken if any of its length is.
        self._is_passed_over = oldest.length not in run
        return [self._pop(buckets, length) for length, count in run.items() for _ in range(count)]

    def take_oldest(self, bounds: Bounds) -> list[Sequence]:
        """Remove and return the oldest of one key, as many as together keep the bounds."""
        oldest = self.oldest
        buckets = self._by_key[oldest.key]
        batch = [self._pop(buckets, 0)]
        num_tokens = oldest.length
        while 0 in buckets and len(batch) < bounds.max_sequences:
            num_tokens += next(iter(buckets[0])).length
            if num_tokens > bounds.max_tokens:
                break
            batch.append(self._pop(buckets, 0))
        return batch

    def _pop(self, buckets: dict[int, _Queue], bucket: int) -> Sequence:
        sequence, _ = buckets[bucket].popitem(last=False)
        self._forget(sequence, buckets, bucket)
        return sequence

    def _forget(self, sequence: Sequence, buckets: dict[int, _Queue], bucket: int) -> None:
        """Drop what else is known of one that left its bucket. Nothing empty stays: keys are callers' options."""
        del self._by_age[sequence]
        self.by_model[sequence.model] -= sequence.length
        if not buckets[bucket]:
            del buckets[bucket]
        if not buckets:
            del self._by_key[sequence.key]
