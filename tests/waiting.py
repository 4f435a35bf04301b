"""Sequences to wait and schedulers for them to wait in, for the tests of the batching policy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from embedq.core.batching.scheduler import Limits, Scheduler
from embedq.core.sequence import Sequence, Tokens, Wanted

MAX_BULK_WAIT_S = 5.0

#: One model as on a CPU, one with other limits, and two whose batches are not padded, the last of like lengths.
LIMITS = {
    "small": Limits(max_batch_tokens=100, max_batch_sequences=7, overhead_tokens=8),
    "large": Limits(max_batch_tokens=400, max_batch_sequences=20, overhead_tokens=40),
    "unpadded": Limits(max_batch_tokens=100, max_batch_sequences=7, overhead_tokens=8, is_padded=False),
    "alike": Limits(100, 7, overhead_tokens=8, is_padded=False, has_like_lengths=True),
}
DENSE, SPARSE = Wanted(frozenset({"dense"})), Wanted(frozenset({"sparse"}))


def sequence(num_tokens: int, model: str = "small", wanted: Wanted = DENSE, is_bulk: bool = False) -> Sequence:
    """A sequence to wait; which tokens it has does not matter here."""
    return Sequence(Tokens(np.zeros(num_tokens, np.int32)), model, wanted, is_bulk)


def scheduler_of(limits: Limits | None = None, max_batch_s: float = 1.0) -> Scheduler:
    return Scheduler(LIMITS | ({"small": limits} if limits else {}), max_batch_s, MAX_BULK_WAIT_S)


def add_all(scheduler: Scheduler, sequences: Iterable[Sequence]) -> list[Sequence]:
    added = list(sequences)
    for one in added:
        scheduler.add(one)
    return added


def drain(scheduler: Scheduler, now_s: float = 0.0) -> list[list[Sequence]]:
    """Every batch until nothing waits."""
    return list(iter(lambda: scheduler.next_batch(now_s), []))


def lengths(batch: Iterable[Sequence]) -> list[int]:
    return [one.length for one in batch]
