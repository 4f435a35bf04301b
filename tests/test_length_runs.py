"""Which lengths share a batch: what is best for the device, and never a batch that two would beat."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq.core.batching.length_runs import Bounds, choose_run

PROPERTY = settings(max_examples=300)

BUCKETS = st.dictionaries(st.integers(0, 130), st.integers(1, 40), min_size=1, max_size=30)
BOUNDS = st.builds(Bounds, st.integers(1, 400), st.integers(1, 20), st.integers(1, 300))


def cost(run: dict[int, int], overhead_tokens: int) -> int:
    """Tokens computed for `run` as one batch, with what starting it costs."""
    return max(run) * sum(run.values()) + overhead_tokens


@PROPERTY
@given(BUCKETS, BOUNDS, st.booleans(), st.randoms(use_true_random=False))
def test_a_run_is_there_fits_its_bounds_and_holds_the_oldest(
    buckets: dict[int, int], bounds: Bounds, may_pass_over: bool, draw: object
) -> None:
    oldest = draw.choice(sorted(buckets))  # type: ignore[attr-defined]
    run = choose_run(buckets, oldest, bounds, may_pass_over)
    assert run
    assert all(0 < count <= buckets[length] for length, count in run.items())
    assert list(run) == sorted(run)
    count = sum(run.values())
    assert count <= bounds.max_sequences
    assert count == 1 or max(run) * count <= bounds.max_tokens
    assert may_pass_over or oldest in run
    # In order of length nothing is left out in between.
    assert all(run[length] == buckets[length] for length in list(run)[1:-1])
    assert [length for length in sorted(buckets) if min(run) <= length <= max(run)] == list(run)


@PROPERTY
@given(BUCKETS, BOUNDS, st.booleans())
def test_no_batch_would_cost_less_as_two(buckets: dict[int, int], bounds: Bounds, may_pass_over: bool) -> None:
    run = choose_run(buckets, min(buckets), bounds, may_pass_over)
    lengths = list(run)
    for cut in range(1, len(lengths)):
        short, long = ({length: run[length] for length in part} for part in (lengths[:cut], lengths[cut:]))
        apart = cost(short, bounds.overhead_tokens) + cost(long, bounds.overhead_tokens)
        assert cost(run, bounds.overhead_tokens) <= apart


def test_short_texts_are_not_padded_to_a_long_one_that_happens_to_wait() -> None:
    buckets, bounds = {9: 1, 10: 2, 500: 1}, Bounds(2_048, 512, 64)
    assert choose_run(buckets, 10, bounds, False) == {9: 1, 10: 2}
    assert choose_run(buckets, 500, bounds, False) == {500: 1}


def test_where_starting_a_batch_costs_more_than_padding_all_go_together() -> None:
    buckets = {9: 1, 10: 2, 500: 1}
    assert choose_run(buckets, 10, Bounds(2_048, 512, 2_000), False) == buckets


@pytest.mark.parametrize("oldest", [10, 30, 50])
def test_the_little_that_waits_is_one_batch_unless_its_padding_costs_more(oldest: int) -> None:
    buckets = dict.fromkeys(range(10, 51, 10), 1)
    # At most 60 tokens are saved by a cut: two of 10 and 20 not padded to 50.
    assert choose_run(buckets, oldest, Bounds(2_048, 512, 64), False) == buckets


def test_of_two_sides_the_one_that_pads_less_joins_the_oldest() -> None:
    assert choose_run({9: 5, 10: 1, 20: 5}, 10, Bounds(60, 512, 8), False) == {9: 5, 10: 1}
    assert choose_run({1: 5, 10: 1, 11: 5}, 10, Bounds(66, 512, 8), False) == {10: 1, 11: 5}


def test_a_batch_may_take_a_part_of_its_longest_length() -> None:
    assert choose_run({98: 3, 100: 1_000}, 98, Bounds(1_000, 512, 64), False) == {98: 1, 100: 9}


def test_only_a_full_batch_that_is_better_goes_before_the_oldest() -> None:
    bounds = Bounds(1_000, 512, 16)
    assert choose_run({10: 1, 100: 10}, 10, bounds, True) == {100: 10}
    assert choose_run({10: 50, 100: 1}, 100, bounds, True) == {100: 1}, "fifty of 10 fill no batch"
    assert choose_run({10: 100, 100: 1}, 100, bounds, True) == {10: 100}
    assert choose_run({10: 1, 100: 10}, 10, bounds, False) == {10: 1}
    assert choose_run({50: 20, 100: 10}, 50, bounds, True) == {50: 20}, "as good as the other"
