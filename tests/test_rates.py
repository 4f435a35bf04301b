"""Rates and speeds, made of counts at moments."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.workers.monitoring.rates import PassCounts, Rates


def rates(*counts: tuple[float, float, int, int]) -> Rates:
    """Of (moment, seconds of work, jobs, tokens), of one model whose passes take half of the time of work."""
    made = Rates()
    for one in counts:
        add(made, *one)
    return made


def add(made: Rates, now_s: float, busy_s: float, num_jobs: int, num_tokens: int) -> None:
    made.add(now_s, busy_s, num_jobs, {"m": PassCounts(busy_s / 2, num_tokens)})


def test_rates_are_those_of_the_last_ten_seconds() -> None:
    made = rates(*((now, now, 5 * now, 500 * now) for now in range(100)))
    assert made.per_second == (5, 500)
    assert made.busy == 1
    for now in range(100, 120):
        add(made, now, 99, 5 * 99, 500 * 99)
    assert made.per_second == (0, 0)
    assert made.busy == 0


def test_a_speed_is_per_second_of_work_however_much_of_the_time_there_was_none() -> None:
    made = rates(*((now, now / 10, now, 100 * now) for now in range(200)))
    assert made.per_second[1] == pytest.approx(100)
    assert made.busy == pytest.approx(0.1)
    assert made.speeds == {"m": pytest.approx(1000)}
    for now in range(200, 400):
        add(made, now, 19.9, 199, 19_900)
    assert made.speeds == {"m": pytest.approx(1000)}, "an idle worker forgets how fast it is"


def test_a_speed_follows_what_is_measured_lately() -> None:
    made = rates(*((now, now, 0, 1000 * now) for now in range(50)))
    for now in range(50, 60):
        add(made, now, now, 0, 49_000 + 10 * (now - 49))
    assert made.speeds["m"] < 300, "after ten seconds of work most of a speed is what it was before"
    for now in range(60, 110):
        add(made, now, now, 0, 49_000 + 10 * (now - 49))
    assert made.speeds == {"m": pytest.approx(10, rel=0.05)}


def test_one_odd_second_does_not_make_a_speed_jump() -> None:
    made = rates(*((now, now, 0, 1000 * now) for now in range(50)))
    add(made, 50, 50, 0, 49_000)
    assert 800 < made.speeds["m"] < 1000


def test_each_model_has_its_own_speed_and_their_work_adds_up_to_the_time_it_took() -> None:
    made = Rates()
    fast, slow = 0, 0
    for now in range(100):  # two thirds of the device's time are the slow model's, a quarter of all the device's
        passes = {"fast": PassCounts(now / 12, 900 * now), "slow": PassCounts(now / 6, 20 * now), "never": PassCounts()}
        made.add(now, now, 0, passes)
        fast, slow = 900 * now, 20 * now
    assert made.speeds == {"fast": pytest.approx(2700), "slow": pytest.approx(30)}
    assert fast / made.speeds["fast"] + slow / made.speeds["slow"] == pytest.approx(99)


def test_a_model_keeps_its_speed_while_another_works() -> None:
    made = Rates()
    for now in range(30):
        made.add(now, now, 0, {"a": PassCounts(now, 100 * now), "b": PassCounts()})
    for now in range(30, 90):
        made.add(now, now, 0, {"a": PassCounts(29.0, 2900), "b": PassCounts(now - 29, 7 * (now - 29))})
    assert made.speeds == {"a": pytest.approx(100), "b": pytest.approx(7)}


def test_a_pass_that_takes_longer_than_a_beat_counts_when_it_has_ended() -> None:
    made = Rates()
    for now in range(41):  # of twenty seconds each
        ended = now // 20
        made.add(now, now, 0, {"m": PassCounts(20.0 * ended, 600 * ended)})
    assert made.speeds == {"m": pytest.approx(30)}


def test_small_batches_of_an_idle_worker_do_not_count_once_it_was_seen_at_work() -> None:
    made = Rates()
    made.add(1, 0.6, 1, {"m": PassCounts(0.6, 60)})
    assert made.speeds == {"m": pytest.approx(100)}, "until then they are all that is known"
    made.add(2, 1.6, 9, {"m": PassCounts(1.6, 10_060, num_loaded=1)})
    assert made.speeds == {"m": pytest.approx(10_000)}
    for now in range(3, 100):
        made.add(now, now, 9 + now, {"m": PassCounts(now, 10_060 + now, num_loaded=1)})
    assert made.speeds == {"m": pytest.approx(10_000)}
    made.add(200, 200, 300, {"m": PassCounts(200, 510_159, num_loaded=2)})
    assert made.speeds == {"m": pytest.approx(5_000, rel=0.02)}


def test_a_speed_is_known_meanwhile_though_too_little_of_it_was_under_load() -> None:
    made = Rates()
    made.add(1, 1, 1, {"m": PassCounts(1.0, 100)})
    made.add(2, 1.4, 9, {"m": PassCounts(1.4, 4_100, num_loaded=1)})
    assert 100 < made.speeds["m"] < 10_000
    made.add(3, 1.6, 9, {"m": PassCounts(1.6, 6_100, num_loaded=2)})
    assert made.speeds == {"m": pytest.approx(10_000)}


def test_an_idle_worker_keeps_no_more_with_time() -> None:
    made = rates((0, 0, 0, 0), *((now, 5, 1, 500) for now in range(1, 1000)))
    assert len(made._lately) == 11


def test_little_work_for_long_is_measured_as_well() -> None:
    made = Rates()
    for now in range(20_000):
        work_s = now / 1000
        passes = {"seldom": PassCounts(work_s, 50 * now), "once": PassCounts(min(work_s, 0.5), 7)}
        made.add(now, 2 * work_s, now, passes)
    assert made.speeds == {"seldom": pytest.approx(25_000, rel=0.001), "once": pytest.approx(14, rel=0.1)}


def test_too_little_work_makes_no_speed() -> None:
    assert rates((0, 0, 0, 0)).speeds == {}
    assert rates((0, 0, 0, 0), (1, 0.1, 1, 5)).speeds == {}
    assert rates((0, 0, 0, 0)).per_second == (0, 0)
    assert rates((0, 0, 0, 0)).busy == 0


@given(st.lists(st.tuples(st.floats(0.1, 1), st.integers(1, 1000)), min_size=10, max_size=50))
def test_a_speed_lies_between_the_slowest_and_the_fastest_second(seconds: list[tuple[float, int]]) -> None:
    made, busy_s, num_tokens = Rates(), 0.0, 0
    made.add(0, 0, 0, {"m": PassCounts()})
    for now, (work_s, tokens) in enumerate(seconds, start=1):
        busy_s, num_tokens = busy_s + work_s, num_tokens + tokens
        made.add(now, busy_s, 0, {"m": PassCounts(busy_s, num_tokens)})
    each = [tokens / work_s for work_s, tokens in seconds]
    assert min(each) * 0.999 <= made.speeds["m"] <= max(each) * 1.001
