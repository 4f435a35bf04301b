"""Heartbeats: what a line carries, and what rates and speeds are made of."""

from __future__ import annotations

import pytest

from embedq.workers.heartbeat_line import READY, Beat
from embedq.workers.monitoring.job_counters import Counts
from embedq.workers.monitoring.rates import Rates


def test_a_beat_comes_out_of_its_line_as_it_went_in() -> None:
    beat = Beat(
        READY, "m.cpu0@host", "m", {"embed.m": "m"}, num_jobs=3, tokens_per_job={"embed.m": 12.5}, speeds={"m": 1e3}
    )
    assert beat.line().endswith(b"}\n")
    assert Beat.read(beat.line()) == beat


def rates(*counts: tuple[float, float, int, int]) -> Rates:
    """Of (moment, seconds of work, jobs, tokens), of one model whose passes take half of the time of work."""
    made = Rates()
    for one in counts:
        add(made, *one)
    return made


def add(made: Rates, now_s: float, busy_s: float, num_jobs: int, num_tokens: int) -> None:
    made.add(now_s, busy_s, num_jobs, {"m": (busy_s / 2, num_tokens)})


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
    for now in range(50, 80):
        add(made, now, now, 0, 49_000 + 10 * (now - 49))
    assert made.speeds == {"m": pytest.approx(10)}


def test_each_model_has_its_own_speed_and_their_work_adds_up_to_the_time_it_took() -> None:
    made = Rates()
    fast, slow = 0, 0
    for now in range(100):  # two thirds of the device's time are the slow model's, a quarter of all the device's
        made.add(now, now, 0, {"fast": (now / 12, 900 * now), "slow": (now / 6, 20 * now), "never": (0.0, 0)})
        fast, slow = 900 * now, 20 * now
    assert made.speeds == {"fast": pytest.approx(2700), "slow": pytest.approx(30)}
    assert fast / made.speeds["fast"] + slow / made.speeds["slow"] == pytest.approx(99)


def test_a_model_keeps_its_speed_while_another_works() -> None:
    made = Rates()
    for now in range(30):
        made.add(now, now, 0, {"a": (now, 100 * now), "b": (0.0, 0)})
    for now in range(30, 90):
        made.add(now, now, 0, {"a": (29.0, 2900), "b": (now - 29, 7 * (now - 29))})
    assert made.speeds == {"a": pytest.approx(100), "b": pytest.approx(7)}


def test_a_pass_that_takes_longer_than_a_beat_counts_when_it_has_ended() -> None:
    made = Rates()
    for now in range(41):  # of twenty seconds each
        ended = now // 20
        made.add(now, now, 0, {"m": (20.0 * ended, 600 * ended)})
    assert made.speeds == {"m": pytest.approx(30)}


def test_an_idle_worker_keeps_no_more_with_time() -> None:
    made = rates((0, 0, 0, 0), *((now, 5, 1, 500) for now in range(1, 1000)))
    assert len(made._speeds["m"]._sums) == 2
    assert len(made._lately) == 11


def test_little_work_for_long_keeps_no_more_with_time() -> None:
    made = Rates()
    for now in range(20_000):
        work_s = now / 1000
        made.add(now, 2 * work_s, now, {"seldom": (work_s, 50 * now), "once": (min(work_s, 0.5), 7)})
    assert made.speeds == {"seldom": pytest.approx(25_000), "once": pytest.approx(14)}
    assert all(len(speed._sums) < 150 for speed in made._speeds.values())


def test_too_little_work_tells_no_speed() -> None:
    assert rates((0, 0, 0, 0)).speeds == {}
    assert rates((0, 0, 0, 0), (1, 0.1, 1, 5)).speeds == {}
    assert rates((0, 0, 0, 0)).per_second == (0, 0)
    assert rates((0, 0, 0, 0)).busy == 0


def test_the_size_of_a_job_is_learned_per_queue_and_lately() -> None:
    counts = Counts()
    for _ in range(1000):
        counts.answered("embed.m", 10)
    for _ in range(1000):
        counts.answered("embed.m", 1000)
    counts.answered("rerank.m", 7)
    counts.answered("embed.refused", 0)  # failed before it was encoded: says nothing of sizes
    assert counts.tokens_per_job() == {"embed.m": pytest.approx(1000, rel=0.01), "rerank.m": 7}
    assert counts.num_jobs == 2002
    for index in range(1000):
        counts.answered(f"made-up-{index}", 1)
    assert len(counts.tokens_per_job()) == 200


def test_time_counts_as_busy_while_anything_is_held() -> None:
    counts = Counts()
    assert counts.busy_s == 0
    counts.holds(True)
    first_s = counts.busy_s
    counts.holds(True)
    assert counts.busy_s >= first_s
    counts.holds(False)
    rested_s = counts.busy_s
    counts.holds(False)
    assert counts.busy_s == rested_s > 0
