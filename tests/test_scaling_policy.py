"""How many workers a backlog asks for: what always holds, and what bursts, trickles and cold starts do."""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.core.errors import InvalidSettings
from embedq.workers.launcher.scaling_policy import Decision, Policy, Seen, Since, decide, work_left_s

POLICY = Policy(min_workers=1, max_workers=8, target_s=10, up_delay_s=3, down_delay_s=60)

seconds = st.floats(0, 1e6)
policies = st.tuples(
    st.integers(0, 5), st.integers(1, 30), st.floats(0.1, 100), st.floats(0, 60), st.floats(0, 600)
).map(lambda drawn: Policy(min(drawn[0], drawn[1]), *drawn[1:]))
sights = st.builds(
    Seen,
    num_ready=st.integers(0, 40),
    loading_s=st.lists(seconds, max_size=5).map(tuple),
    work_s=st.none() | st.just(0.0) | seconds,
    num_busy=st.floats(0, 40),
    load_s=st.floats(0, 1000),
)
sinces = st.builds(Since, up_s=st.none() | seconds, down_s=st.none() | seconds)


def present(seen: Seen) -> int:
    return seen.num_ready + len(seen.loading_s)


@given(policies, sights, sinces, seconds)
def test_the_bounds_are_kept_whatever_is_seen(policy: Policy, seen: Seen, since: Since, now_s: float) -> None:
    decision = decide(policy, seen, since, now_s)
    if present(seen) > 0 or policy.min_workers > 0:
        assert policy.min_workers <= decision.num_workers <= policy.max_workers
    assert decision.reason


@given(policies, sights, sinces, seconds)
def test_workers_leave_one_at_a_time_and_never_while_one_loads(
    policy: Policy, seen: Seen, since: Since, now_s: float
) -> None:
    decision = decide(policy, seen, since, now_s)
    if present(seen) <= policy.max_workers and decision.num_workers < present(seen):
        assert decision.num_workers == seen.num_ready - 1
        assert not seen.loading_s


@given(policies, sights, seconds)
def test_nothing_moves_on_first_sight_within_the_bounds(policy: Policy, seen: Seen, now_s: float) -> None:
    policy = dataclasses.replace(policy, up_delay_s=1 + policy.up_delay_s, down_delay_s=1 + policy.down_delay_s)
    if policy.min_workers <= present(seen) <= policy.max_workers and present(seen) > 0:
        assert decide(policy, seen, Since(), now_s).num_workers == present(seen)


@given(policies, sights, st.floats(0, 1e6), seconds)
def test_more_work_never_means_fewer_workers(policy: Policy, seen: Seen, more_s: float, now_s: float) -> None:
    if seen.work_s is None:
        return
    long_ago = Since(up_s=now_s - policy.up_delay_s - 1, down_s=now_s - policy.down_delay_s - 1)
    busier = dataclasses.replace(seen, work_s=seen.work_s + more_s)
    assert decide(policy, busier, long_ago, now_s).num_workers >= decide(policy, seen, long_ago, now_s).num_workers


@given(policies, sights, sinces, seconds)
def test_a_worker_leaves_only_if_the_others_have_next_to_no_backlog(
    policy: Policy, seen: Seen, since: Since, now_s: float
) -> None:
    decision = decide(policy, seen, since, now_s)
    if decision.num_workers < present(seen) <= policy.max_workers:
        assert seen.work_s is not None
        assert seen.work_s <= policy.target_s / 2 * decision.num_workers
        assert seen.num_busy <= decision.num_workers


@given(sights, st.floats(0, 1000), st.floats(0, 1000))
def test_work_left_falls_with_time_and_never_below_none(seen: Seen, early_s: float, later_s: float) -> None:
    early_s, later_s = sorted((early_s, later_s))
    assert 0 <= work_left_s(seen, later_s) <= work_left_s(seen, early_s) <= (seen.work_s or 0)


def seen(
    num_ready: int, work_s: float | None, load_s: float = 8, num_busy: float = 0, loading_s: tuple[float, ...] = ()
) -> Seen:
    return Seen(num_ready, loading_s, work_s, num_busy, load_s)


def test_a_backlog_that_is_gone_before_a_worker_has_loaded_starts_none() -> None:
    waited = Since(up_s=0)
    assert decide(POLICY, seen(1, 65, load_s=60), waited, 100).num_workers == 1
    assert decide(POLICY, seen(1, 65, load_s=5), waited, 100).num_workers == 6
    assert decide(POLICY, seen(1, 71, load_s=60), waited, 100).num_workers == 2


def test_a_worker_that_loads_counts_for_what_it_will_do() -> None:
    waited = Since(up_s=0)
    assert decide(POLICY, seen(1, 60), waited, 100).num_workers == 6
    assert decide(POLICY, seen(1, 60, loading_s=(1,) * 5), waited, 100).num_workers == 6
    assert decide(POLICY, seen(1, 600, loading_s=(1,) * 5), waited, 100).num_workers == 8


def test_work_left_is_what_ready_and_loading_workers_do_not_do() -> None:
    assert work_left_s(seen(1, 100, load_s=10, loading_s=(4, 20)), 10) == 100 - 10 - 4 - 10
    assert work_left_s(seen(2, 15), 10) == 0


def test_one_leaves_only_once_the_others_would_have_half_of_the_backlog_that_is_allowed() -> None:
    waited = Since(down_s=0)
    assert decide(POLICY, seen(3, 10.1), waited, 100).num_workers == 3
    assert decide(POLICY, seen(3, 10), waited, 100).num_workers == 2


def test_after_a_decision_the_delays_begin_anew() -> None:
    assert decide(POLICY, seen(1, 600), Since(up_s=0), 100) == Decision(8, mock.ANY, Since())
    assert decide(POLICY, seen(2, 0), Since(down_s=0), 100) == Decision(1, mock.ANY, Since())
    assert decide(POLICY, seen(1, 600), Since(down_s=0), 100).since == Since(up_s=100)
    assert decide(POLICY, seen(2, 0), Since(up_s=0), 100).since == Since(down_s=100)


def test_a_decision_tells_its_figures() -> None:
    assert decide(POLICY, seen(1, 60), Since(up_s=95), 100).reason == (
        "a backlog of 60.0 s for 5.0 s: after 8.0 s of loading 52.0 s of work are left, the target is 10.0 s per worker"
    )
    assert decide(POLICY, seen(3, 2, num_busy=0.25), Since(down_s=0), 100).reason == (
        "a backlog of 0.7 s for 100.0 s, and work for 0.25 workers"
    )


def test_without_workers_the_first_job_starts_one_at_once_and_the_last_worker_leaves_when_all_is_done() -> None:
    policy = dataclasses.replace(POLICY, min_workers=0)
    assert decide(policy, seen(0, 0.0), Since(), 0).num_workers == 0
    assert decide(policy, seen(0, None), Since(), 0).num_workers == 1
    assert decide(policy, seen(0, 0.1), Since(), 0).num_workers == 1
    assert decide(policy, seen(1, 0.0), Since(down_s=0), 60).num_workers == 0
    assert decide(policy, seen(1, 0.1), Since(down_s=0), 60).num_workers == 1


def test_nothing_is_decided_before_a_speed_is_measured() -> None:
    assert decide(POLICY, seen(2, None), Since(up_s=0, down_s=0), 1e6) == Decision(
        2, "work waits, and no worker's speed is measured yet", Since()
    )


@pytest.mark.parametrize("wrong", [(-1, 1), (2, 1), (0, 0), (1, 1, 0.0), (1, 1, 10.0, -1.0), (1, 1, 10.0, 1.0, -1.0)])
def test_bounds_and_delays_that_mean_nothing_are_refused(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidSettings, match="given"):
        Policy(*wrong)


def run(arriving: Callable[[int], float], policy: Policy, num_seconds: int, load_s: float = 8) -> list[int]:
    """Workers that are ready, second by second, while so many seconds of work come in with each."""
    since, work_s = Since(), 0.0
    ages: list[float] = [load_s] * policy.min_workers
    done: deque[float] = deque([0.0] * 10, maxlen=10)
    history = []
    for now in range(num_seconds):
        ready = sum(age >= load_s for age in ages)
        work_s += arriving(now)
        done.append(min(ready, work_s))
        work_s -= done[-1]
        loading_s = tuple(age for age in ages if age < load_s)
        decision = decide(policy, Seen(ready, loading_s, work_s, sum(done) / 10, load_s), since, now)
        since = decision.since
        ages = sorted((age + 1 for age in ages), reverse=True)[: decision.num_workers]
        ages += [0.0] * (decision.num_workers - len(ages))
        history.append(ready)
    return history


def test_a_burst_brings_workers_and_they_leave_one_by_one() -> None:
    history = run(lambda now: 300 if now == 10 else 0, POLICY, 700)
    assert max(history) == 8
    assert history[:10] == [1] * 10
    assert history[-1] == 1
    falls = [now for now in range(1, 700) if history[now] < history[now - 1]]
    assert len(falls) == 7
    assert all(later - earlier >= POLICY.down_delay_s for earlier, later in itertools.pairwise(falls))


def test_a_trickle_and_short_bursts_move_nothing() -> None:
    assert set(run(lambda now: 0.3, POLICY, 1000)) == {1}
    assert set(run(lambda now: 9 if now % 30 == 0 else 0, POLICY, 1000)) == {1}


def test_a_steady_load_settles_on_enough_workers_and_stays() -> None:
    history = run(lambda now: 2.4, POLICY, 3000)
    assert set(history[1500:]) == {3}


def test_slow_loading_is_not_answered_with_more_and_more_workers() -> None:
    at_first = run(lambda now: 400 if now == 0 else 0, POLICY, 30, load_s=120)
    assert set(at_first) == {1}
    assert max(run(lambda now: 130 if now == 0 else 0, POLICY, 400, load_s=120)) == 1
    assert max(run(lambda now: 200 if now == 0 else 0, POLICY, 400, load_s=120)) == 8


def test_from_none_to_work_and_back_to_none() -> None:
    history = run(lambda now: 5 if now == 50 else 0, dataclasses.replace(POLICY, min_workers=0), 200)
    assert history[:50] == [0] * 50
    assert max(history) == 1
    assert history[-1] == 0
