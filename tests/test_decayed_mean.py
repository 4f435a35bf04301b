"""A decayed mean: of what was added lately, by its weights, whatever came before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.core.batching.decayed_mean import DecayedMean

values = st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0.001, 1e3)), min_size=1, max_size=30)


def test_what_is_one_half_life_old_counts_half() -> None:
    mean = DecayedMean(half_life=10)
    assert (mean.mean, mean.weight) == (0, 0)
    mean.add(8)
    mean.add(2, age=10)
    assert (mean.mean, mean.weight) == ((8 / 2 + 2) / 1.5, 1.5)
    mean.add(30, weight=3, age=20)
    assert mean.mean == pytest.approx((8 / 8 + 2 / 4 + 30) / (1 / 8 + 1 / 4 + 3))


@given(values, st.floats(0.1, 100))
def test_a_mean_lies_among_the_values_by_weight(added: list[tuple[float, float]], half_life: float) -> None:
    mean = DecayedMean(half_life)
    for value, weight in added:
        mean.add(value * weight, weight)
    least, most = min(value for value, _ in added), max(value for value, _ in added)
    assert least - 1e-3 <= mean.mean <= most + 1e-3


@given(st.floats(-1e6, 1e6), values, st.floats(0.1, 100))
def test_what_is_many_half_lives_old_counts_for_nothing(
    value: float, before: list[tuple[float, float]], half_life: float
) -> None:
    mean = DecayedMean(half_life)
    for old, weight in before:
        mean.add(old * weight, weight)
    mean.add(value, age=60 * half_life)
    assert mean.mean == pytest.approx(value, abs=1e-3)
