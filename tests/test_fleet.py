"""The workers of a launcher: started where there is room, watched, replaced. Their processes beat and do nothing else."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embedq.core.devices import Device
from embedq.workers.heartbeat_line import DRAINING, LOADING, READY, Beat
from embedq.workers.launcher import worker_process as worker_process
from embedq.workers.launcher.fleet import Fleet
from embedq.workers.launcher.rolling_restart import Rolling
from embedq.workers.launcher.stall_detector import Patience
from embedq.workers.launcher.status_table import Lines
from embedq.workers.launcher.worker_process import Child, Event, Reporting

DEVICES = [Device("cuda", 0, ""), Device("cuda", 1, "")]

TIMEOUT_S = 30.0


class Driven:
    """A fleet and the loop that a launcher would run. A context manager."""

    def __init__(
        self, wanted: int, per_device: int = 1, drains_first: bool = False, working_s: float = 60, loading_s: float = 60
    ) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        reporting = Reporting(self._events.put, self._beat, self._ended, list[str]().append, Lines())
        self.environment: dict[str, str] = {}
        self.say({"state": READY})
        patience = Patience(silent_s=TIMEOUT_S, working_s=working_s, loading_s=loading_s)
        self.fleet = Fleet(DEVICES, per_device, self.environment, {}, reporting, patience, drain_timeout_s=0.5)
        self.fleet.wanted = wanted
        self.rolling = Rolling(self.fleet, drains_first)
        self.pids: list[int] = []
        self.has_failed = False
        self.fewest_ready = 1_000

    def __enter__(self) -> Driven:
        return self

    def __exit__(self, *_: object) -> None:
        self.fleet.drain_all()

    def say(self, *beats: dict[str, Any], **environment: str) -> None:
        """What workers started from now on tell, and their further variables."""
        self.environment.clear()
        self.environment.update({"BEATS": json.dumps(beats), **environment})

    def until(self, condition: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline_s
            now_s = time.monotonic()
            self.fleet.watch(now_s)
            self.rolling.step(now_s)
            if not self.rolling.is_under_way:
                self.fleet.settle(now_s)
            self.fleet.start_due(now_s)
            self.pids += [
                one.process.pid for one in self.fleet.children if one.process and one.process.pid not in self.pids
            ]
            try:
                self._events.get(timeout=0.05)()
            except queue.Empty:
                continue
            self.fewest_ready = min(self.fewest_ready, self.num_ready)

    @property
    def num_ready(self) -> int:
        return sum(one.is_ready for one in self.fleet.children)

    @property
    def labels(self) -> list[str]:
        return [one.label for one in self.fleet.children]

    def _beat(self, child: Child, process: subprocess.Popen[bytes], beat: Beat) -> None:
        if child.process is process:
            self.fleet.beat(child, beat, time.monotonic(), is_server_up=True)

    def _ended(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        self.has_failed |= child.process is process and not self.fleet.ended(child, time.monotonic())


@pytest.fixture(autouse=True)
def beating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "COMMAND", (sys.executable, "-m", "tests.beating_worker"))
    monkeypatch.setattr(worker_process, "_FIRST_BACKOFF_S", 0.05)


def test_devices_are_filled_evenly_and_emptied_from_the_end() -> None:
    with Driven(wanted=3, per_device=2) as driven:
        driven.until(lambda: driven.num_ready == 3)
        assert driven.labels == ["cuda0", "cuda1", "cuda0-2"]
        driven.fleet.wanted = 1
        driven.until(lambda: driven.labels == ["cuda0"])
        driven.fleet.wanted = 9
        driven.until(lambda: driven.num_ready == 4)
        assert driven.labels == ["cuda0", "cuda1", "cuda0-2", "cuda1-2"]


@pytest.mark.parametrize("stuck", [{"num_held": 3}, {"num_turns": 7}])
def test_a_worker_that_stands_still_is_killed_and_another_started(stuck: dict[str, int]) -> None:
    with Driven(wanted=1, working_s=0.2) as driven:
        driven.say({"state": READY, **stuck})
        driven.until(lambda: len(driven.pids) == 1)
        driven.say({"state": READY})
        driven.until(lambda: len(driven.pids) == 2 and driven.num_ready == 1)
        assert not driven.has_failed


def test_a_worker_that_loads_for_long_is_left_alone() -> None:
    with Driven(wanted=1, working_s=0.1) as driven:
        driven.say(*({"state": LOADING} for _ in range(30)), {"state": READY})
        driven.until(lambda: driven.num_ready == 1)
        assert len(driven.pids) == 1
        assert driven.fleet.load_s > 0.3


def test_one_that_hangs_while_it_loads_is_replaced_after_pauses_and_after_three_times_all_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Driven(wanted=1, loading_s=0.3) as driven:
        driven.say({"state": LOADING})
        driven.until(lambda: driven.has_failed)
        assert len(driven.pids) == 3
    actions = [vars(record).get("action") for record in caplog.records]
    assert actions.count("worker_stalled") == 3
    assert actions.count("worker_crashed") == 2, "the pauses before the second and the third"
    assert "not loaded in 0 s; if it needs longer, raise EMBEDQ_LOAD_TIMEOUT_S" in caplog.text


def test_one_that_hung_once_and_loads_the_next_time_serves() -> None:
    with Driven(wanted=1, loading_s=0.5) as driven:
        driven.say({"state": LOADING})
        driven.until(lambda: len(driven.pids) == 1)
        driven.say({"state": READY})
        driven.until(lambda: driven.num_ready == 1)
        assert len(driven.pids) == 2
        assert driven.fleet.children[0].num_refusals == 0


def test_a_pause_before_each_restart_that_doubles(caplog: pytest.LogCaptureFixture) -> None:
    with Driven(wanted=1) as driven:
        driven.say({"state": LOADING}, BEATING_EXIT="3")
        driven.until(lambda: len(driven.pids) == 4)
        told = [vars(record).get("in_s") for record in caplog.records if vars(record).get("action") == "worker_crashed"]
        assert told[:3] == [0.05, 0.1, 0.2]
        assert not driven.has_failed


def test_one_drained_by_somebody_else_ends_within_the_bound_and_is_missed_by_nobody() -> None:
    with Driven(wanted=1) as driven:
        driven.until(lambda: driven.num_ready == 1)
        driven.say({"state": READY}, {"state": DRAINING}, BEATING_STAYS="1")
        driven.fleet.wanted = 2
        driven.until(lambda: driven.fleet.wanted == 1)
        driven.until(lambda: len(driven.fleet.children) == 1)
        assert len(driven.pids) == 2


def test_a_first_worker_that_cannot_start_is_a_failure_and_one_among_others_gets_three_tries() -> None:
    with Driven(wanted=1) as driven:
        driven.say({"state": LOADING}, BEATING_EXIT="1")
        driven.until(lambda: driven.has_failed)
        assert len(driven.pids) == 1
    with Driven(wanted=2) as driven:
        driven.until(lambda: driven.num_ready == 2)
        driven.say({"state": LOADING}, BEATING_EXIT="1")
        os.kill(driven.pids[0], signal.SIGKILL)
        driven.until(lambda: driven.has_failed)
        assert len(driven.pids) == 2 + 3


@pytest.mark.parametrize(("drains_first", "fewest"), [(False, 2), (True, 1)])
def test_replacing_keeps_all_workers_or_all_but_one(drains_first: bool, fewest: int) -> None:
    with Driven(wanted=2, drains_first=drains_first) as driven:
        driven.until(lambda: driven.num_ready == 2)
        driven.fewest_ready = 2
        driven.rolling.begin()
        driven.until(lambda: not driven.rolling.is_under_way)
        assert driven.fewest_ready == fewest
        assert len(driven.pids) == 4
        assert driven.num_ready == 2


@pytest.mark.parametrize("drains_first", [False, True])
def test_successors_alone_may_serve_another_revision_and_not_after_a_crash(drains_first: bool) -> None:
    with Driven(wanted=2, drains_first=drains_first) as driven:
        driven.until(lambda: driven.num_ready == 2)
        assert may_replace(driven) == {False}
        driven.rolling.begin()
        driven.until(lambda: not driven.rolling.is_under_way)
        assert may_replace(driven) == {True}
        for child in driven.fleet.children:
            assert child.process
            child.process.kill()
        driven.until(lambda: len(driven.pids) == 6 and driven.num_ready == 2)
        assert may_replace(driven) == {False}


def may_replace(driven: Driven) -> set[bool]:
    """What the environments of the workers present say."""
    environments = [
        Path(f"/proc/{one.process.pid}/environ").read_bytes() for one in driven.fleet.children if one.process
    ]
    return {b"EMBEDQ_REPLACE_REVISION=true" in one.split(b"\0") for one in environments}


@pytest.mark.parametrize("drains_first", [False, True])
@pytest.mark.parametrize("code", ["1", "3"])
def test_a_successor_that_fails_ends_the_replacing(drains_first: bool, code: str) -> None:
    with Driven(wanted=2, drains_first=drains_first) as driven:
        driven.until(lambda: driven.num_ready == 2)
        driven.say({"state": LOADING}, BEATING_EXIT=code)
        driven.rolling.begin()
        driven.until(lambda: not driven.rolling.is_under_way)
        assert driven.num_ready == (1 if drains_first else 2)
        assert driven.fleet.wanted == (1 if drains_first else 2)
        assert len(driven.pids) == 3
        assert not driven.has_failed


def test_a_worker_that_dies_while_its_successor_loads_has_one() -> None:
    with Driven(wanted=1) as driven:
        driven.until(lambda: driven.num_ready == 1)
        driven.say(*({"state": LOADING} for _ in range(20)), {"state": READY})
        driven.rolling.begin()
        driven.until(lambda: len(driven.pids) == 2)
        os.kill(driven.pids[0], signal.SIGKILL)
        driven.until(lambda: not driven.rolling.is_under_way)
        assert driven.num_ready == 1
        assert len(driven.pids) == 2


def test_a_process_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with Driven(wanted=1) as driven:
        right = worker_process.COMMAND
        monkeypatch.setattr(worker_process, "COMMAND", ("/no/such/program",))
        driven.until(lambda: driven.fleet.children and (driven.fleet.children[0].due_s or 0) > 0)
        monkeypatch.setattr(worker_process, "COMMAND", right)
        driven.until(lambda: driven.num_ready == 1)


def test_a_process_keeps_the_limits_of_its_start_and_the_next_one_has_the_new_ones() -> None:
    with Driven(wanted=1) as driven:
        driven.say(*({"state": LOADING} for _ in range(30)), {"state": READY})
        driven.until(lambda: driven.pids)
        driven.fleet.reload(Patience(silent_s=TIMEOUT_S, working_s=60, loading_s=0.1), drain_timeout_s=0.5)
        driven.until(lambda: driven.num_ready == 1)
        assert len(driven.pids) == 1, "it loaded for longer than the new limit allows"
        driven.say({"state": LOADING})
        os.kill(driven.pids[0], signal.SIGKILL)
        driven.until(lambda: len(driven.pids) >= 3)


def test_a_new_limit_of_draining_holds_at_once() -> None:
    with Driven(wanted=1) as driven:
        driven.until(lambda: driven.num_ready == 1)
        child = driven.fleet.children[0]
        driven.fleet.reload(child.patience, drain_timeout_s=1000)
        driven.fleet.drain(child, 5.0)
        assert child.deadline_s == 1005
