"""How much waits for one model, and how fast it is computed: what launcher and exporter both go by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.tasks.backlog_estimate import Estimate, estimate, mean_speed
from embedq.tasks.speeds import Speed

queued = st.dictionaries(st.sampled_from(["embed", "embed.m", "rerank.m"]), st.integers(0, 1000), min_size=1)
sizes = st.dictionaries(st.sampled_from(["embed", "embed.m", "rerank.m"]), st.floats(1, 1e4))
measured = st.builds(Speed, st.just(0.0) | st.floats(1, 1e6), sizes)


def test_a_job_counts_as_the_workers_see_it_then_as_last_seen_then_as_assumed() -> None:
    waiting, latest = {"embed": 2}, Speed(5.0, {"embed": 9.0})
    assert estimate(waiting, [Speed(10.0, {"embed": 20.0}), Speed(30.0, {"embed": 40.0})], latest) == (60, 20)
    assert estimate(waiting, [Speed()], latest) == (18, 5)
    assert estimate(waiting, [], Speed(0.0, {"rerank.m": 4.0, "embed.m": 6.0})) == (10, 0)
    assert estimate(waiting, [], Speed(), Speed(7.0, {"any": 3.0})) == (6, 7)
    assert estimate(waiting, [], Speed()) is None
    assert estimate({"embed": 0}, [], Speed()) == (0, 0)


def test_seconds_are_those_of_so_many_workers_and_none_where_nothing_waits() -> None:
    assert Estimate(300.0, 10.0).seconds() == 30
    assert Estimate(300.0, 10.0).seconds(3) == 10
    assert Estimate(0.0, 0.0).seconds() == 0


def test_a_worker_that_has_measured_nothing_does_not_count_in_the_mean() -> None:
    assert mean_speed([Speed(10.0), Speed(), Speed(30.0)]) == 20
    assert mean_speed([Speed()]) == 0


@given(queued, queued, st.lists(measured, max_size=4), measured, st.floats(1, 1e6), st.floats(1, 1e4))
def test_two_backlogs_together_take_the_time_of_both(
    one: dict[str, int], two: dict[str, int], workers: list[Speed], latest: Speed, speed: float, size: float
) -> None:
    both = {queue: one.get(queue, 0) + two.get(queue, 0) for queue in one | two}
    found = [estimate(waiting, workers, latest, Speed(speed, {"any": size})) for waiting in (one, two, both)]
    seconds = [part.seconds() for part in found if part is not None]
    assert len(seconds) == 3
    assert seconds[0] + seconds[1] == pytest.approx(seconds[2])
