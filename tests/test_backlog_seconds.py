"""How much work waits: over models of any speed, and among launchers that share queues."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.tasks.speeds import Report, Speed
from embedq.workers.heartbeat_line import READY, Beat
from embedq.workers.launcher.backlog_seconds import mean_speeds, others_s, part_of, work_s
from embedq.workers.launcher.queue_lengths import Look
from embedq.workers.launcher.scaling_policy import Policy, Seen, Since, decide

QUEUES = {"embed": "fast", "embed.fast": "fast", "rerank.slow": "slow"}

SIZES = {"embed": 10.0, "embed.fast": 30.0, "rerank.slow": 1000.0}

SPEEDS = {"fast": 100.0, "slow": 50.0}


def beat(speeds: dict[str, float] = SPEEDS, sizes: dict[str, float] = SIZES, **fields: Any) -> Beat:
    """A worker that has measured these speeds, and seen jobs of these sizes."""
    models = {
        alias: Speed(speeds.get(alias, 0.0), {queue: sizes[queue] for queue in sizes if QUEUES[queue] == alias})
        for alias in QUEUES.values()
    }
    return Beat(READY, models=models, **fields)


#: The one worker there is.
ALONE = {"w": beat()}

speeds = st.floats(1, 1e6)
jobs = st.fixed_dictionaries(dict.fromkeys(QUEUES, st.integers(0, 10_000)))


def report(**of_models: float) -> Report:
    return Report(0.0, {alias: Speed(speed) for alias, speed in of_models.items()})


def alone(queued: dict[str, int], **known: float) -> float | None:
    return work_s(Look(queued), {"w": beat(known or SPEEDS)}, QUEUES, known or SPEEDS)


def test_work_for_several_models_is_the_sum_of_the_times_they_need() -> None:
    assert alone({"embed": 5, "embed.fast": 5, "rerank.slow": 2}) == 5 * 10 / 100 + 5 * 30 / 100 + 2 * 1000 / 50


@given(jobs, jobs, speeds, speeds)
def test_work_of_two_backlogs_together_is_that_of_each(
    one: dict[str, int], two: dict[str, int], fast: float, slow: float
) -> None:
    both = {queue: one[queue] + two[queue] for queue in QUEUES}
    parts = [alone(queued, fast=fast, slow=slow) for queued in (one, two, both)]
    assert parts[0] is not None
    assert parts[1] is not None
    assert parts[0] + parts[1] == pytest.approx(parts[2])


@given(jobs, speeds, speeds, speeds)
def test_a_models_work_does_not_depend_on_how_fast_the_other_is(
    queued: dict[str, int], fast: float, slow: float, other: float
) -> None:
    only = queued | {"rerank.slow": 0}
    assert alone(only, fast=fast, slow=slow) == alone(only, fast=fast, slow=other)


@given(jobs, st.integers(1, 1000))
def test_more_jobs_are_more_work(queued: dict[str, int], more: int) -> None:
    fewer_s, more_s = alone(queued), alone(queued | {"rerank.slow": queued["rerank.slow"] + more})
    assert fewer_s is not None
    assert more_s is not None
    assert more_s > fewer_s


def test_what_workers_hold_counts_whole_and_with_its_models_speed() -> None:
    beats = {"w": replace(ALONE["w"], waiting={"fast": 200, "slow": 200}), "v": Beat(READY, waiting={"slow": 100})}
    others = {"elsewhere": report(fast=100.0, slow=50.0)}
    assert work_s(Look({}, others), beats, QUEUES, SPEEDS) == 200 / 100 + 300 / 50


def test_a_job_counts_as_those_of_its_queue_then_as_the_models_last_ones_then_as_any() -> None:
    def size(latest: dict[str, Speed], *beats: Beat) -> float | None:
        look = Look({"embed": 1}, latest=latest)
        return work_s(look, {str(number): beat for number, beat in enumerate(beats)}, QUEUES, {"fast": 1.0})

    theirs = {"fast": Speed(0.0, {"embed.fast": 40.0})}
    assert size(theirs, beat({}, {"embed": 10.0}), beat({}, {"embed": 30.0})) == 20
    assert size(theirs | {"fast": Speed(0.0, {"embed": 7.0, "embed.fast": 9.0})}, Beat()) == 7
    assert size(theirs, beat({}, {"rerank.slow": 1000.0})) == 40
    assert size({}, beat({}, {"rerank.slow": 1000.0})) == 1000
    assert size({}, Beat(num_held=4, waiting={"fast": 400})) == 400 + 100
    assert size({}, Beat()) is None


def test_a_model_that_was_never_measured_here_is_as_fast_as_elsewhere_and_else_as_the_fastest() -> None:
    look = Look({"rerank.slow": 2})
    unmeasured = {"w": beat({})}
    assert work_s(look, unmeasured, QUEUES, {"fast": 100.0, "other": 20.0}) == 2 * 1000 / 100
    assert work_s(replace(look, latest={"slow": Speed(10.0)}), unmeasured, QUEUES, {"fast": 100.0}) == 2 * 1000 / 10
    assert work_s(look, unmeasured, QUEUES, {}) is None
    assert work_s(Look({"rerank.slow": 0}), unmeasured, QUEUES, {}) == 0


def test_a_model_is_as_fast_as_it_was_here_while_its_workers_have_not_measured_it_anew() -> None:
    look = Look({"rerank.slow": 2}, latest={"slow": Speed(10.0)})
    assert work_s(look, {"w": beat({})}, QUEUES, {"slow": 20.0}) == 2 * 1000 / 20


def test_before_a_worker_takes_jobs_nobody_knows_how_much_waits() -> None:
    assert work_s(Look({"embed": 1}, latest={"fast": Speed(9.0, SIZES)}), {}, QUEUES, SPEEDS) is None
    assert work_s(Look({"embed": 0}), {}, QUEUES, {}) == 0


def test_speeds_are_the_mean_of_the_workers_that_measured_them() -> None:
    beats = [
        Beat(models={"a": Speed(10.0), "b": Speed(1.0)}),
        Beat(models={"a": Speed(30.0), "b": Speed(), "c": Speed()}),
        Beat(),
    ]
    assert mean_speeds(beats) == {"a": 20, "b": 1}


def test_a_launchers_part_is_that_of_its_workers_speed() -> None:
    workers = {"ours": report(a=100.0), "theirs": report(a=300.0, b=5.0), "new": report(a=0.0)}
    assert part_of("a", ["ours"], workers) == 100 / (100 + 300 + 200)
    assert part_of("a", ["ours", "new"], workers) == 300 / 600
    assert part_of("a", ["ours", "not reported yet"], workers) == 300 / 800
    assert part_of("a", [], workers) == 0
    assert part_of("b", ["ours"], {"ours": report(b=1.0)}) == 1
    assert part_of("b", ["ours"], {}) == 1


@given(st.lists(st.lists(st.just(0.0) | speeds, min_size=1, max_size=4), min_size=1, max_size=5))
def test_the_parts_of_all_launchers_are_the_whole(launchers: list[list[float]]) -> None:
    named = [{f"{at}-{n}": report(a=speed) for n, speed in enumerate(own)} for at, own in enumerate(launchers)]
    everybody = {name: one for own in named for name, one in own.items()}
    assert sum(part_of("a", own, everybody) for own in named) == pytest.approx(1)


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(0, 100_000), st.floats(10, 1000), st.floats(1, 60)
)
def test_several_launchers_on_one_queue_start_together_what_one_would(
    launchers: list[int], num_jobs: int, speed: float, target_s: float
) -> None:
    policy, long_ago = Policy(1, 10_000_000, target_s=target_s, up_delay_s=0), Since(up_s=0.0)

    def wanted(names: list[str], everybody: list[str]) -> int:
        look = Look({"embed": num_jobs}, {name: report(fast=speed) for name in everybody})
        beats = {name: beat({"fast": speed}) for name in names}
        seen = Seen(len(names), (), work_s(look, beats, QUEUES, mean_speeds(beats.values())), 0.0, 8.0)
        return decide(policy, seen, long_ago, 100.0).num_workers

    named = [[f"{at}-{n}" for n in range(number)] for at, number in enumerate(launchers)]
    everybody = [name for names in named for name in names]
    together = sum(wanted(names, everybody) for names in named)
    assert abs(together - wanted(everybody, everybody)) <= len(launchers)


def test_others_are_through_with_what_is_queued_by_all_their_speed() -> None:
    look = Look({"embed": 100}, {"one": report(fast=100.0), "two": report(fast=300.0)}, {"fast": Speed(9.0, SIZES)})
    assert others_s(look, [], QUEUES) == 100 * 10 / 400
    assert others_s(look, ["two"], QUEUES) == 100 * 10 / 100
    assert others_s(look, ["one", "two"], QUEUES) is None
    assert others_s(replace(look, queued={"embed": 100, "rerank.slow": 1}), [], QUEUES) is None
    assert others_s(replace(look, workers={"one": report(fast=0.0)}), [], QUEUES) == 100 * 10 / 9
    assert others_s(replace(look, latest={}), [], QUEUES) is None
    assert others_s(Look(), [], QUEUES) == 0
