"""Who goes first: interactive before bulk, the older before the younger, and nobody is kept out."""

from __future__ import annotations

import numpy as np
import pytest

from embedq.core.sequence import Sequence
from tests.waiting import MAX_BULK_WAIT_S, SPARSE, add_all, drain, scheduler_of, sequence


def test_of_two_kinds_of_work_the_one_that_waits_longer_goes_first() -> None:
    scheduler = scheduler_of()
    rare = add_all(scheduler, [sequence(5, wanted=SPARSE)])
    add_all(scheduler, (sequence(50, "large") for _ in range(30)))
    assert scheduler.next_batch(0.0) == rare


@pytest.mark.parametrize("bulk_came_first", [True, False])
def test_interactive_goes_before_bulk(bulk_came_first: bool) -> None:
    scheduler = scheduler_of()
    add_all(scheduler, (sequence(5, is_bulk=is_bulk) for is_bulk in (bulk_came_first, not bulk_came_first)))
    assert [one.is_bulk for batch in drain(scheduler, 100.0) for one in batch] == [False, True]


def served(batch_s: float, until_s: float) -> list[tuple[float, bool]]:
    """When which class was served, with a minute and more of bulk there at once and interactive work without end."""
    scheduler = scheduler_of()
    add_all(scheduler, (sequence(50, is_bulk=True) for _ in range(1_000)))
    now_s, order = 0.0, []
    while now_s < until_s:
        # Three arrive for the two a batch holds: interactive work alone would never end.
        add_all(scheduler, (sequence(50) for _ in range(3)))
        order.append((now_s, scheduler.next_batch(now_s)[0].is_bulk))
        now_s += batch_s
    return order


def test_bulk_gets_a_batch_in_every_while_however_much_interactive_work_comes() -> None:
    bulk_s = [now_s for now_s, is_bulk in served(batch_s=0.25, until_s=60.0) if is_bulk]
    assert len(bulk_s) >= 10
    # Its time runs from the first batch that was preferred to it; then the running one ends.
    assert max(np.diff([0.0, *bulk_s])) <= MAX_BULK_WAIT_S + 2 * 0.25


def test_bulk_older_than_its_wait_does_not_keep_interactive_work_out() -> None:
    order = served(batch_s=0.25, until_s=60.0)
    bulk_s = [now_s for now_s, is_bulk in order if is_bulk]
    assert min(np.diff(bulk_s)) >= MAX_BULK_WAIT_S
    assert len(bulk_s) <= 0.06 * len(order)


def test_of_batches_that_take_longer_than_the_wait_bulk_gets_every_other_one() -> None:
    order = [is_bulk for _, is_bulk in served(batch_s=2 * MAX_BULK_WAIT_S, until_s=100.0)]
    assert order == [False, True] * 5


def test_the_wait_of_bulk_begins_anew_when_none_is_left() -> None:
    scheduler = scheduler_of()
    first = sequence(5, is_bulk=True)
    for now_s, one in ((0.0, first), (90.0, sequence(5, is_bulk=True))):
        add_all(scheduler, [one, sequence(5), sequence(5, wanted=SPARSE)])
        assert not scheduler.next_batch(now_s)[0].is_bulk
        scheduler.remove(first)
        assert not scheduler.next_batch(now_s + 1.0)[0].is_bulk


@pytest.mark.parametrize(("is_bulk", "max_batches"), [(False, 1), (True, 2)])
def test_full_batches_of_younger_ones_do_not_keep_the_oldest_waiting(is_bulk: bool, max_batches: int) -> None:
    scheduler = scheduler_of()
    oldest = sequence(7, is_bulk=is_bulk)
    scheduler.add(oldest)
    batches: list[list[Sequence]] = []
    while oldest not in (batches[-1] if batches else []) and len(batches) < 100:
        add_all(scheduler, (sequence(50, is_bulk=is_bulk) for _ in range(4)))
        batches.append(scheduler.next_batch(0.0))
    assert len(batches) == max_batches
