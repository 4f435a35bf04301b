"""The batching policy, as properties over every history of arrivals, batches and withdrawals."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.scheduler import MAX_INTERACTIVE_PRIORITY, Scheduler
from core.sequence import Sequence, Tokens

PROPERTY = settings(deadline=None, derandomize=True, max_examples=150)

MAX_TOKENS, MAX_SEQUENCES, MAX_WAIT_S = 100, 7, 5.0

#: What happens next: some sequences arrive, a batch is taken, or a job is withdrawn. Each with the
#: seconds that have passed since the step before.
ARRIVAL = st.lists(
    st.tuples(
        st.integers(1, 130),  # tokens; some alone exceed the budget
        st.sampled_from("abc"),  # key
        st.integers(0, 9),  # priority
        st.integers(0, 3),  # job
    ),
    max_size=30,
)
STEPS = st.lists(
    st.tuples(
        st.floats(0, 4), st.one_of(ARRIVAL, st.just("batch"), st.just("batch"), st.integers(0, 3))
    ),
    max_size=25,
)  # fmt: skip


def sequence(num_tokens: int, job: object = None, row: int = 0, **fields: object) -> Sequence:
    """A waiting sequence; its tokens do not matter here."""
    return Sequence(Tokens(np.zeros(num_tokens, np.int32)), job, row, **fields)  # type: ignore[arg-type]


def is_bulk(one: Sequence) -> bool:
    return one.priority > MAX_INTERACTIVE_PRIORITY


def drain(scheduler: Scheduler, now_s: float = 0.0) -> list[list[Sequence]]:
    """Every batch until nothing waits."""
    return list(iter(lambda: scheduler.next_batch(now_s), []))


class History:
    """Plays steps against the scheduler, with a plain list of what ought to wait beside it."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(MAX_TOKENS, MAX_SEQUENCES, MAX_WAIT_S)
        self.waiting: list[Sequence] = []
        self.now_s = 0.0
        self.num_arrived = 0

    def play(self, step: object) -> None:
        if step == "batch":
            self.check_batch(self.scheduler.next_batch(self.now_s))
        elif isinstance(step, int):
            self.scheduler.remove(step)
            self.waiting = [one for one in self.waiting if one.job != step]
        else:
            assert isinstance(step, list)
            arrived = [self._sequence(*fields) for fields in step]
            self.scheduler.add(arrived)
            self.waiting += arrived
        assert self.scheduler.num_sequences == len(self.waiting)
        assert self.scheduler.num_tokens == sum(one.length for one in self.waiting)

    def check_batch(self, batch: list[Sequence]) -> None:
        """All promises of `next_batch`, for one batch out of what waits."""
        assert bool(batch) == bool(self.waiting)
        if not batch:
            return
        assert len({id(one) for one in batch}) == len(batch)
        assert {id(one) for one in batch} <= {id(one) for one in self.waiting}
        assert len({(is_bulk(one), one.key) for one in batch}) == 1
        assert len(batch) <= MAX_SEQUENCES
        assert len(batch) == 1 or max(one.length for one in batch) * len(batch) <= MAX_TOKENS
        assert self.most_urgent() in batch
        gone = {id(one) for one in batch}
        self.waiting = [one for one in self.waiting if id(one) not in gone]

    def most_urgent(self) -> Sequence:
        """The oldest of what goes first: interactive, and bulk that has waited too long."""
        first = [one for one in self.waiting if not is_bulk(one) or self.now_s - one.arrived_s > MAX_WAIT_S]
        return min(first or self.waiting, key=lambda one: (one.arrived_s, one.row))

    def _sequence(self, num_tokens: int, key: str, priority: int, job: int) -> Sequence:
        self.num_arrived += 1
        # A tick between any two, so that "the oldest" is one sequence.
        self.now_s += 1e-6
        return sequence(num_tokens, job, self.num_arrived, key=key, priority=priority, arrived_s=self.now_s)


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


@PROPERTY
@given(st.lists(st.integers(1, 130), min_size=1, max_size=60), st.integers(1, 200), st.integers(1, 20))
def test_every_sequence_is_handed_out_once_within_any_budget(
    lengths: list[int], max_tokens: int, max_sequences: int
) -> None:
    scheduler = Scheduler(max_tokens, max_sequences, MAX_WAIT_S)
    scheduler.add(sequence(length, row=row) for row, length in enumerate(lengths))
    batches = drain(scheduler)
    assert sorted(one.row for batch in batches for one in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= max_sequences
        assert len(batch) == 1 or max(one.length for one in batch) * len(batch) <= max_tokens


def test_a_sequence_longer_than_the_budget_goes_alone() -> None:
    scheduler = Scheduler(100, 10, MAX_WAIT_S)
    scheduler.add(sequence(length, row=length) for length in (1, 500, 2))
    assert sorted([one.row for one in batch] for batch in drain(scheduler)) == [[1, 2], [500]]


def test_the_nearest_lengths_join_the_oldest() -> None:
    scheduler = Scheduler(45, 10, MAX_WAIT_S)
    scheduler.add(sequence(length) for length in (10, 30, 11, 1, 9))
    assert sorted(one.length for one in scheduler.next_batch(0)) == [1, 9, 10, 11]


@pytest.mark.parametrize("bulk_came_first", [True, False])
def test_interactive_goes_before_bulk(bulk_came_first: bool) -> None:
    scheduler = Scheduler(100, 10, MAX_WAIT_S)
    scheduler.add([sequence(5, priority=9, arrived_s=0.0 if bulk_came_first else 2.0)])
    scheduler.add([sequence(5, priority=0, arrived_s=1.0)])
    assert [one.priority for batch in drain(scheduler, 3.0) for one in batch] == [0, 9]


def test_bulk_is_served_once_it_has_waited_its_time_however_much_interactive_work_comes() -> None:
    scheduler = Scheduler(20, 2, MAX_WAIT_S)
    scheduler.add([sequence(5, priority=9)])
    now_s = 0.0
    served_s = None
    while served_s is None and now_s < 100:
        now_s += 0.25
        # Three arrive for two that are served: interactive work alone would never end.
        scheduler.add(sequence(5, arrived_s=now_s) for _ in range(3))
        if any(is_bulk(one) for one in scheduler.next_batch(now_s)):
            served_s = now_s
    assert served_s is not None
    assert MAX_WAIT_S < served_s <= 3 * MAX_WAIT_S


def test_no_key_starves_another() -> None:
    scheduler = Scheduler(20, 2, MAX_WAIT_S)
    scheduler.add([sequence(5, key="rare", arrived_s=0.5)])
    for number in range(10):
        scheduler.add(sequence(5, key="busy", arrived_s=float(number)) for _ in range(3))
    order = [batch[0].key for batch in drain(scheduler, 10.0)]
    assert order.index("rare") <= 2


def test_equal_lengths_leave_in_the_order_they_came() -> None:
    scheduler = Scheduler(12, 4, MAX_WAIT_S)
    scheduler.add(sequence(3, row=row) for row in range(10))
    assert [one.row for batch in drain(scheduler) for one in batch] == list(range(10))


def test_a_withdrawn_job_frees_its_place_and_never_comes() -> None:
    scheduler = Scheduler(100, 10, MAX_WAIT_S)
    keep, drop = object(), object()
    scheduler.add(
        sequence(4, job, key=key, priority=priority) for job in (keep, drop) for key in "ab" for priority in (0, 9)
    )
    scheduler.remove(drop)
    assert (scheduler.num_sequences, scheduler.num_tokens) == (4, 16)
    assert {one.job for batch in drain(scheduler) for one in batch} == {keep}
    scheduler.remove(keep)  # already gone: nothing happens
    assert (scheduler.num_sequences, scheduler.num_tokens) == (0, 0)


def test_an_empty_scheduler_gives_an_empty_batch_and_keeps_no_keys() -> None:
    scheduler = Scheduler(100, 10, MAX_WAIT_S)
    scheduler.add(sequence(1, key=number) for number in range(1000))
    assert len(drain(scheduler)) == 1000
    assert scheduler.next_batch(0.0) == []
    assert not scheduler._classes


@pytest.mark.parametrize("seed", range(3))
def test_a_deep_backlog_of_real_lengths_is_padded_by_less_than_five_percent(seed: int) -> None:
    # Passages: half of them below 150 tokens, 200 on average, one in ten cut at 512.
    lengths = np.random.default_rng(seed).lognormal(5.0, 1.0, 5000).clip(3, 512).astype(int)
    scheduler = Scheduler(16_384, 512, MAX_WAIT_S)
    scheduler.add(sequence(int(length)) for length in lengths)
    assert padding_share(drain(scheduler)) < 0.05


def padding_share(batches: Iterable[list[Sequence]]) -> float:
    """Padding over all tokens that a padded forward pass computes."""
    computed = used = 0
    for batch in batches:
        computed += max(one.length for one in batch) * len(batch)
        used += sum(one.length for one in batch)
    return 1 - used / computed
