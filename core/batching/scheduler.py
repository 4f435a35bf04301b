"""Chooses the next batch from the waiting sequences. Pure policy: no threads, no clock, no tensors.

A batch is whatever waits when the device becomes free, up to a budget of tokens (padding included where the model
pads), and no more than the device computes in `max_batch_s`.

- Interactive sequences run before bulk ones. Bulk that has been passed over for `max_bulk_wait_s` gets one batch, then
  interactive work comes first again: an hour of bulk takes one batch now and then, however long it has waited.
- Within a class the oldest sequence decides the model and the outputs.
- Among the sequences like it, those lengths run that use the device best (`core.batching.length_runs`). The oldest
  interactive one is always among them. At most one batch runs before the oldest bulk one: with 16 batches' worth
  waiting that gains 1 to 2 % of throughput. So a sequence with `n` older ones in its class is in one of the class's
  next `n + 1` batches, `2 * (n + 1)` if it is bulk.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from embedq.core.batching.batch_stats import ModelTotals, Totals
from embedq.core.batching.bulk_share import BulkShare
from embedq.core.batching.length_runs import Bounds, choose_run
from embedq.core.sequence import Sequence, Wanted, num_computed_tokens

#: A batch may have this many tokens however slow the device was measured. Below it the start-up cost outweighs the
#: batch, and one slow pass (the first, say) would keep batches too small to measure a better speed.
MIN_BATCH_TOKENS = 256

#: Decay factor per batch of the measured speed: about the last ten batches count.
DECAY_PER_BATCH = 0.9


@dataclass(slots=True)
class Limits:
    """Limits of a model's batches, and how the model computes them."""

    #: Tokens of a batch; a longer sequence runs alone.
    max_batch_tokens: int
    max_batch_sequences: int
    #: Cost of starting a batch, in tokens of compute, at least 1. More makes batches fuller, less makes them less
    #: padded.
    overhead_tokens: int
    #: Whether sequences are padded to the longest of their batch: tokens are then longest x count, otherwise the sum.
    is_padded: bool = True
    #: Whether to batch by length though nothing is padded. Padded models always batch by length.
    has_like_lengths: bool = False

    @property
    def is_by_length(self) -> bool:
        """True if length decides which sequences share a batch; otherwise age alone does."""
        return self.is_padded or self.has_like_lengths


class Scheduler:
    """Holds the waiting sequences and chooses batches. Not thread-safe: the caller holds a lock."""

    def __init__(self, limits: Mapping[str, Limits], max_batch_s: float, max_bulk_wait_s: float) -> None:
        """`limits` are by model alias; `max_batch_s` bounds a batch once the model's speed is known."""
        #: Counts of the batches formed, by model.
        self.totals_by_model = {model: ModelTotals() for model in limits}
        self._max_batch_s = max_batch_s
        self._bulk_share = BulkShare(max_bulk_wait_s)
        self._limits = {model: replace(given) for model, given in limits.items()}
        self._speeds = {model: _Speed() for model in limits}
        self._interactive, self._bulk = _Class(may_pass_over=False), _Class(may_pass_over=True)

    @property
    def num_sequences(self) -> int:
        """Number of waiting sequences."""
        return len(self._interactive) + len(self._bulk)

    @property
    def totals(self) -> Totals:
        """Counts of the batches formed, over all models."""
        each = self.totals_by_model.values()
        return Totals(
            sum(one.num_batches for one in each),
            sum(one.num_sequences for one in each),
            sum(one.num_tokens for one in each),
            sum(one.num_padded_tokens for one in each),
            sum(one.num_budget_tokens for one in each),
        )

    def num_tokens(self, is_bulk: bool) -> int:
        """Waiting tokens of one class, without padding."""
        return self._class(is_bulk).by_model.total()

    def num_tokens_of(self, model: str) -> int:
        """Waiting tokens of one model, without padding."""
        return self._interactive.by_model[model] + self._bulk.by_model[model]

    def add(self, sequence: Sequence) -> None:
        """Queue `sequence`."""
        self._class(sequence.is_bulk).add(sequence, self._bucket(sequence))

    def remove(self, sequence: Sequence) -> None:
        """Remove `sequence` if it still waits."""
        self._class(sequence.is_bulk).remove(sequence, self._bucket(sequence))

    def promote(self, sequence: Sequence) -> None:
        """Make a waiting bulk sequence the newest interactive one; does nothing for others."""
        if self._bulk.remove(sequence, self._bucket(sequence)):
            sequence.is_bulk = False
            self.add(sequence)

    def next_batch(self, now_s: float) -> list[Sequence]:
        """Take the next batch; empty if nothing waits.

        Its sequences share key and class. Their tokens are within `budget`; a single longer sequence runs alone.
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
        """Most tokens of a batch of `model` now.

        The same for both classes, because either waits for the other's batch.
        """
        max_tokens, speed = self._limits[model].max_batch_tokens, self._speeds[model]
        if speed.seconds <= 0:
            return max_tokens
        in_time = self._max_batch_s * speed.num_tokens / speed.seconds
        return int(min(max_tokens, max(MIN_BATCH_TOKENS, in_time)))

    def max_tokens(self, model: str) -> int:
        """Most tokens of a batch of `model`, however fast the model is."""
        return self._limits[model].max_batch_tokens

    @property
    def largest_budget(self) -> int:
        """The largest budget of any model now."""
        return max(map(self.budget, self._limits), default=0)

    def finished(self, model: str, num_tokens_padded: int, seconds: float) -> None:
        """Update the measured speed of `model` with a batch that took `seconds`."""
        self._speeds[model].add(num_tokens_padded, seconds)

    def lower_budget(self, model: str, max_tokens: int) -> None:
        """Limit batches of `model` to `max_tokens` from now on; never raises the budget."""
        limits = self._limits[model]
        limits.max_batch_tokens = min(limits.max_batch_tokens, max_tokens)

    def _class(self, is_bulk: bool) -> _Class:
        return self._bulk if is_bulk else self._interactive

    def _bucket(self, sequence: Sequence) -> int:
        """The sequence's length; 0 for all where age alone decides."""
        return sequence.length if self._limits[sequence.model].is_by_length else 0

    def _next_class(self, now_s: float) -> _Class:
        if len(self._bulk) and len(self._interactive) and not self._bulk_share.is_due(now_s):
            return self._interactive
        # From here on bulk runs, or none waits: either way it is not passed over.
        self._bulk_share.restart()
        return self._bulk if len(self._bulk) else self._interactive

    def _count(self, batch: list[Sequence], is_padded: bool, budget: int) -> None:
        num_tokens = sum(sequence.length for sequence in batch)
        num_computed = num_computed_tokens(batch, is_padded)
        self.totals_by_model[batch[0].model].add(len(batch), num_tokens, num_computed, budget)


class _Speed:
    """Decayed sums of tokens and seconds over the last batches; as sums, so that a small batch weighs little."""

    def __init__(self) -> None:
        self.num_tokens = 0.0
        self.seconds = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        self.num_tokens = self.num_tokens * DECAY_PER_BATCH + num_tokens
        self.seconds = self.seconds * DECAY_PER_BATCH + seconds


#: Sequences in the order they were added; taking the first and removing any one take constant time.
_Queue = OrderedDict[Sequence, None]


class _Class:
    """The waiting sequences of one class: all of them by age, and those of each key by length and then by age."""

    def __init__(self, may_pass_over: bool) -> None:
        #: Waiting tokens by model, without padding.
        self.by_model: Counter[str] = Counter()
        self._may_pass_over = may_pass_over
        self._by_age: _Queue = OrderedDict()
        self._by_key: dict[tuple[str, Wanted], dict[int, _Queue]] = {}
        #: Whether the last batch left the oldest out. The next one must take it.
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
        """Remove `sequence`; returns whether it waited here."""
        if sequence not in self._by_age:
            return False
        buckets = self._by_key[sequence.key]
        del buckets[bucket][sequence]
        self._forget(sequence, buckets, bucket)
        return True

    def take_run(self, bounds: Bounds) -> list[Sequence]:
        """Take the run of lengths that uses the device best, the oldest of each length."""
        oldest = self.oldest
        buckets = self._by_key[oldest.key]
        counts = {length: len(queue) for length, queue in buckets.items()}
        run = choose_run(counts, oldest.length, bounds, self._may_pass_over and not self._is_passed_over)
        # The oldest of all is the first of its length, so it is taken if any of that length is.
        self._is_passed_over = oldest.length not in run
        return [self._pop(buckets, length) for length, count in run.items() for _ in range(count)]

    def take_oldest(self, bounds: Bounds) -> list[Sequence]:
        """Take the oldest sequences of one key, as many as the bounds allow."""
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
        """Remove a sequence that left its bucket from the other indexes, and drop buckets that are empty."""
        del self._by_age[sequence]
        self.by_model[sequence.model] -= sequence.length
        if not buckets[bucket]:
            del buckets[bucket]
        if not buckets:
            del self._by_key[sequence.key]
