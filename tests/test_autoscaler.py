"""The autoscaler on real processes that beat, and on a real server's word of who else works."""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

import pytest
from kombu import Connection

from embedq import tasks
from embedq.tasks.speeds import Report, Speed, Speeds
from embedq.workers.heartbeat_line import READY
from embedq.workers.launcher import worker_process as worker_process
from embedq.workers.launcher.autoscaler import Autoscaler
from embedq.workers.launcher.queue_lengths import BacklogSize, Look
from embedq.workers.launcher.scaling_policy import Policy
from tests.own_server import OwnServer
from tests.test_fleet import Driven

QUEUES = {"embed.m": "m"}

OURS, THEIRS = "m.cuda0@here", "m.cuda0@there"

BEAT = {"state": READY, "worker": OURS, "queues": QUEUES, "models": {"m": asdict(Speed(100.0, {"embed.m": 10.0}))}}

TIMEOUT_S = 30.0


@pytest.fixture(autouse=True)
def beating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "COMMAND", (sys.executable, "-m", "tests.beating_worker"))


@pytest.fixture
def driven() -> Iterator[Driven]:
    """One worker that takes jobs."""
    with Driven(wanted=1) as made:
        made.say(BEAT)
        made.until(lambda: made.num_ready == 1)
        yield made


def scaler(driven: Driven, least: int = 1) -> Autoscaler:
    return Autoscaler(Policy(least, 2, up_delay_s=0), driven.fleet, QUEUES, is_on=True)


def test_a_launchers_backlog_is_its_workers_part_of_what_the_server_holds(
    driven: Driven, own: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.client.flushall()
    monkeypatch.setattr(tasks.app, "connection_for_read", lambda: Connection(own.url))
    own.client.lpush("embed.m", *["a job"] * 80)
    speeds, told = Speeds(own.client), queue.SimpleQueue[Look | None]()

    def seen() -> Look:
        counting = BacklogSize(QUEUES, told.put)
        counting.start()
        try:
            look = told.get(timeout=TIMEOUT_S)
        finally:
            counting.close()
            counting.join(TIMEOUT_S)
        assert look is not None
        return look

    ours = scaler(driven)
    speeds.publish(OURS, {"m": Speed(100.0)})
    assert ours.seen(seen(), 0.0).work_s == 80 * 10 / 100
    speeds.publish(THEIRS, {"m": Speed(300.0, {"embed.m": 10.0})})
    assert ours.seen(seen(), 0.0).work_s == 80 * 10 / 100 / 4
    assert ours.seen(seen(), 0.0).others_s == 80 * 10 / 300
    speeds.withdraw(THEIRS)
    assert ours.seen(seen(), 0.0).work_s == 80 * 10 / 100


def test_a_worker_of_ours_that_takes_no_jobs_any_more_is_nobody_elses(driven: Driven) -> None:
    look = Look({"embed.m": 80}, {OURS: Report(0.0, {"m": Speed(100.0)})}, {"m": Speed(100.0, {"embed.m": 10.0})})
    ours = scaler(driven)
    assert ours.seen(look, 0.0).others_s is None
    driven.fleet.drain(driven.fleet.children[0], time.monotonic())
    seen = ours.seen(look, 0.0)
    assert (seen.num_ready, seen.work_s, seen.others_s) == (0, None, None)


def test_without_workers_one_is_started_unless_those_of_others_suffice(driven: Driven) -> None:
    latest = {"m": Speed(100.0, {"embed.m": 10.0})}
    driven.fleet.wanted = 0
    driven.until(lambda: not driven.fleet.children)
    ours = scaler(driven, least=0)
    there = {THEIRS: Report(0.0, {"m": Speed(100.0)})}
    ours.step(Look({"embed.m": 100}, there, latest), 0.0)
    assert driven.fleet.wanted == 0
    ours.step(Look({"embed.m": 101}, there, latest), 0.0)
    assert driven.fleet.wanted == 1
    driven.fleet.wanted = 0
    ours.step(Look({"embed.m": 1}, {}, latest), 0.0)
    assert driven.fleet.wanted == 1


@pytest.mark.parametrize(("least", "comes_back"), [(1, True), (0, False)])
def test_one_that_is_drained_by_name_is_replaced_only_where_fewer_than_the_least_are_left(
    driven: Driven, least: int, comes_back: bool
) -> None:
    ours = scaler(driven, least)
    first = driven.pids[0]
    driven.say(BEAT)
    child = driven.fleet.children[0]
    assert child.process is not None
    child.process.terminate()  # what Celery's remote `shutdown` does in the worker
    driven.until(lambda: not driven.fleet.children)
    assert driven.fleet.wanted == 0
    ours.step(Look(), 0.0)
    assert driven.fleet.wanted == (1 if comes_back else 0)
    if comes_back:
        driven.until(lambda: driven.num_ready == 1)
        assert driven.pids[-1] != first
