"""The batching policy, as properties over every history of arrivals, batches, removals and promotions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq.core.batching.batch_stats import Totals
from embedq.core.batching.scheduler import MIN_BATCH_TOKENS, Limits, Scheduler
from embedq.core.sequence import Sequence, Tokens
from tests.bench.padding import simulate
from tests.waiting import DENSE, LIMITS, MAX_BULK_WAIT_S, SPARSE, add_all, drain, lengths, scheduler_of, sequence

PROPERTY = settings(max_examples=150)

#: What happens next, with the seconds since the step before: sequences arrive, a batch is taken, or
#: the one at some place among all that ever came is removed or promoted.
ARRIVAL = st.lists(
    st.tuples(
        st.integers(1, 130),  # tokens; some alone exceed the budget
        st.sampled_from(sorted(LIMITS)),
        st.sampled_from((DENSE, SPARSE)),
        st.booleans(),  # bulk
    ),
    max_size=30,
)
ONE = st.tuples(st.sampled_from(("remove", "promote")), st.integers(0, 200))
STEPS = st.lists(st.tuples(st.floats(0, 4), st.one_of(ARRIVAL, st.just("batch"), st.just("batch"), ONE)), max_size=40)


def batch_tokens(batch: list[Sequence]) -> int:
    """What `batch` takes of its budget."""
    return max(lengths(batch)) * len(batch) if LIMITS[batch[0].model].is_padded else sum(lengths(batch))


def holds_nothing(scheduler: Scheduler) -> bool:
    """Whether no trace of a sequence or a key is left."""
    classes = (scheduler._interactive, scheduler._bulk)
    return (
        not any(one._by_age or one._by_key or any(one.by_model.values()) for one in classes)
        and scheduler.num_sequences == 0
    )


class History:
    """Plays steps against the scheduler, with a plain list of what ought to wait beside it."""

    def __init__(self) -> None:
        self.scheduler = scheduler_of()
        self.waiting: list[Sequence] = []
        self.came: list[Sequence] = []
        self.now_s = 0.0
        self.num_passed_over = {False: 0, True: 0}
        self.last_bulk_s = 0.0

    def play(self, step: object) -> None:
        if step == "batch":
            self.check_batch(self.scheduler.next_batch(self.now_s))
        elif isinstance(step, list):
            arrived = add_all(self.scheduler, (sequence(*fields) for fields in step))
            self.waiting += arrived
            self.came += arrived
        elif isinstance(step, tuple) and self.came:
            self.change(step[0], self.came[step[1] % len(self.came)])
        assert self.scheduler.num_sequences == len(self.waiting)
        for is_bulk in (False, True):
            there = sum(one.length for one in self.waiting if one.is_bulk is is_bulk)
            assert self.scheduler.num_tokens(is_bulk) == there
        for model in LIMITS:
            there = sum(one.length for one in self.waiting if one.model == model)
            assert self.scheduler.num_tokens_of(model) == there

    def change(self, what: str, one: Sequence) -> None:
        """Remove or promote one that waits, or has left already: then nothing happens."""
        is_waiting, was_bulk = one in self.waiting, one.is_bulk
        getattr(self.scheduler, what)(one)
        if is_waiting and (what == "remove" or was_bulk):
            self.waiting.remove(one)
        if what == "promote":
            assert one.is_bulk is (was_bulk and not is_waiting)
            if is_waiting and was_bulk:
                self.waiting.append(one)  # the newest of its class

    def check_batch(self, batch: list[Sequence]) -> None:
        """All promises of `next_batch`, for one batch out of what waits."""
        assert bool(batch) == bool(self.waiting)
        if not batch:
            return
        gone = {id(one) for one in batch}
        assert len(gone) == len(batch)
        assert gone <= {id(one) for one in self.waiting}
        assert len({(one.is_bulk, one.model, one.wanted) for one in batch}) == 1
        limits = LIMITS[batch[0].model]
        assert len(batch) <= limits.max_batch_sequences
        assert len(batch) == 1 or batch_tokens(batch) <= limits.max_batch_tokens
        self.check_order(batch)
        self.waiting = [one for one in self.waiting if id(one) not in gone]

    def check_order(self, batch: list[Sequence]) -> None:
        is_bulk = batch[0].is_bulk
        if is_bulk:
            if any(not one.is_bulk for one in self.waiting):
                assert self.now_s - self.last_bulk_s >= MAX_BULK_WAIT_S
            self.last_bulk_s = self.now_s
        oldest = next(one for one in self.waiting if one.is_bulk is is_bulk)
        self.num_passed_over[is_bulk] = 0 if oldest in batch else self.num_passed_over[is_bulk] + 1
        assert oldest.key == batch[0].key
        assert self.num_passed_over[is_bulk] <= (1 if is_bulk else 0)


@PROPERTY
@given(STEPS)
def test_after_every_step_the_batch_and_the_counts_are_right(steps: list[tuple[float, object]]) -> None:
    history = History()
    for passed_s, step in steps:
        history.now_s += passed_s
        history.play(step)
    while history.waiting:  # nothing is lost: all of it comes out in the end
        history.play("batch")
    assert history.scheduler.next_batch(history.now_s) == []
    assert holds_nothing(history.scheduler)


@PROPERTY
@given(
    st.lists(st.integers(1, 130), min_size=1, max_size=80), st.integers(1, 200), st.integers(1, 20), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_every_sequence_leaves_once_within_any_budget_and_in_time(
    wanted_lengths: list[int], max_tokens: int, max_sequences: int, is_bulk: bool, is_padded: bool
) -> None:
    scheduler = scheduler_of(Limits(max_tokens, max_sequences, 8, is_padded))
    added = add_all(scheduler, (sequence(length, is_bulk=is_bulk) for length in wanted_lengths))
    batches = drain(scheduler)
    assert sorted(id(one) for batch in batches for one in batch) == sorted(map(id, added))
    left = {id(one): number for number, batch in enumerate(batches) for one in batch}
    for num_older, one in enumerate(added):
        assert left[id(one)] < (num_older + 1) * (2 if is_bulk and is_padded else 1)
    for batch in batches:
        num_tokens = max(lengths(batch)) * len(batch) if is_padded else sum(lengths(batch))
        assert len(batch) == 1 or (num_tokens <= max_tokens and len(batch) <= max_sequences)


@pytest.mark.parametrize("model", ["small", "unpadded"])
def test_a_sequence_longer_than_the_budget_goes_alone(model: str) -> None:
    scheduler = scheduler_of()
    add_all(scheduler, (sequence(length, model) for length in (1, 500, 2)))
    assert [500] in [lengths(batch) for batch in drain(scheduler)]


def test_without_padding_order_of_age_decides_and_tokens_are_summed() -> None:
    scheduler = scheduler_of()
    added = add_all(scheduler, (sequence(length, "unpadded") for length in (90, 1, 9, 50, 50)))
    assert drain(scheduler) == [added[:3], added[3:]]


def test_where_like_lengths_are_better_without_padding_they_share_batches_and_only_tokens_are_counted() -> None:
    lengths_ = (20, 1, 22, 2, 21, 3)
    padded, alike = scheduler_of(), scheduler_of()
    add_all(padded, (sequence(length, "small") for length in lengths_))
    add_all(alike, (sequence(length, "alike") for length in lengths_))
    batches = [lengths(batch) for batch in drain(alike)]
    assert batches == [lengths(batch) for batch in drain(padded)]
    assert len(batches) == 2
    assert (alike.totals.num_padded_tokens, alike.totals.padding_share) == (sum(lengths_), 0.0)
    assert padded.totals.padding_share > 0


def test_equal_lengths_leave_in_the_order_they_came() -> None:
    scheduler = scheduler_of()
    added = add_all(scheduler, (sequence(30) for _ in range(10)))
    assert [one for batch in drain(scheduler) for one in batch] == added


def test_removed_ones_never_come_and_their_place_is_free() -> None:
    scheduler = scheduler_of()
    added = add_all(scheduler, (sequence(4, model, is_bulk=is_bulk) for model in LIMITS for is_bulk in (False, True)))
    for one in added[::2]:
        scheduler.remove(one)
        scheduler.remove(one)  # gone already: nothing happens
    assert (scheduler.num_tokens(False), scheduler.num_tokens(True)) == (0, 4 * len(LIMITS))
    assert [one for batch in drain(scheduler) for one in batch] == added[1::2]
    assert holds_nothing(scheduler)


def test_a_promoted_one_no_longer_waits_with_bulk() -> None:
    scheduler = scheduler_of()
    bulk = add_all(scheduler, (sequence(50, is_bulk=True) for _ in range(20)))
    interactive = add_all(scheduler, (sequence(50) for _ in range(3)))
    scheduler.promote(bulk[15])
    scheduler.promote(interactive[0])  # it already is: its turn stays
    assert (scheduler.num_tokens(False), scheduler.num_tokens(True)) == (200, 950)
    assert [scheduler.next_batch(0.0) for _ in range(2)] == [interactive[:2], [interactive[2], bulk[15]]]


def test_the_limits_given_are_not_changed_and_a_lowered_budget_never_rises() -> None:
    given_limits = {name: replace(limits) for name, limits in LIMITS.items()}
    scheduler = Scheduler(given_limits, 1.0, MAX_BULK_WAIT_S)
    for max_tokens, expected in ((120, 100), (60, 60), (80, 60)):
        scheduler.lower_budget("small", max_tokens)
        assert scheduler.budget("small") == expected
    add_all(scheduler, (sequence(20) for _ in range(5)))
    assert [len(batch) for batch in drain(scheduler)] == [3, 2]
    assert scheduler.budget("large") == 400
    assert given_limits == LIMITS


LONG = Limits(max_batch_tokens=100_000, max_batch_sequences=10_000, overhead_tokens=8)


@PROPERTY
@given(st.lists(st.tuples(st.integers(1, 20_000), st.floats(1e-4, 10)), min_size=1, max_size=30), st.booleans())
def test_a_batch_takes_no_longer_than_allowed_at_any_speed_measured(
    batches: list[tuple[int, float]], is_bulk: bool
) -> None:
    scheduler = scheduler_of(LONG, max_batch_s=0.5)
    for num_tokens, seconds in batches:
        scheduler.finished("small", num_tokens, seconds)
    in_time = [0.5 * num_tokens / seconds for num_tokens, seconds in batches]
    budget = scheduler.budget("small")
    least, most = (min(100_000, max(MIN_BATCH_TOKENS, tokens)) for tokens in (min(in_time), max(in_time)))
    assert int(least) - 1 <= budget <= most + 1
    add_all(scheduler, (sequence(100, is_bulk=is_bulk) for _ in range(1_100)))
    batch = scheduler.next_batch(0.0)
    assert batch_tokens(batch) == min(budget // 100, 1_100) * 100


def test_speed_is_that_of_the_last_batches_and_small_ones_weigh_little() -> None:
    scheduler = scheduler_of(LONG, max_batch_s=0.5)
    assert scheduler.budget("small") == 100_000  # nothing measured yet
    scheduler.finished("small", 10_000, 10.0)  # a first pass that had to compile something
    for _ in range(100):
        scheduler.finished("small", 10_000, 0.1)
    assert scheduler.budget("small") == pytest.approx(50_000, rel=0.01)
    scheduler.finished("small", 20, 0.005)
    assert scheduler.budget("small") == pytest.approx(50_000, rel=0.02)
    scheduler.finished("large", 600, 1.0)
    assert scheduler.budget("large") == 300
    assert scheduler.budget("small") == pytest.approx(50_000, rel=0.02)  # each model has a speed of its own


def test_the_totals_are_those_of_all_batches() -> None:
    scheduler = scheduler_of()
    assert (scheduler.totals.padding_share, scheduler.totals.fill) == (0.0, 0.0)
    add_all(scheduler, (sequence(length, "large") for length in (95, 100)))
    add_all(scheduler, (sequence(length, "unpadded") for length in (10, 80)))
    drain(scheduler)
    totals = scheduler.totals
    assert totals == Totals(2, 4, num_tokens=285, num_padded_tokens=290, num_budget_tokens=500)
    assert (totals.padding_share, totals.fill) == (pytest.approx(5 / 290), 290 / 500)


class Watched(Sequence):
    """Counts how often any is looked at."""

    num_looks = 0

    @property
    def length(self) -> int:
        Watched.num_looks += 1
        return len(self.tokens.ids)

    @length.setter
    def length(self, length: int) -> None:
        """Sequences keep theirs."""


def test_a_batch_does_not_look_at_all_that_wait() -> None:
    scheduler = scheduler_of(LONG)
    add_all(scheduler, (Watched(Tokens(np.zeros(1 + number % 50, np.int32)), "small") for number in range(30_000)))
    scheduler.lower_budget("small", 1_000)
    Watched.num_looks = 0
    batch = scheduler.next_batch(0.0)
    assert 10 <= len(batch) <= Watched.num_looks <= 10 * len(batch)


@pytest.mark.parametrize("max_tokens", [2_048, 16_384])
@pytest.mark.parametrize("mean", [132, 200])
def test_sixteen_batches_waiting_are_enough_for_less_than_five_percent_of_padding(mean: int, max_tokens: int) -> None:
    row = simulate(mean, max_tokens, depth=16, num_batches=150)
    assert row.padding < 0.05
    assert row.fill > 0.7  # not bought with small batches
    assert row.longest_wait < 6
