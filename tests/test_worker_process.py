"""One worker of a launcher: its environment, what its process reports, its end, and when it starts again."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedq.core.devices import Device
from embedq.workers.heartbeat_line import DRAINING, LOADING, READY, Beat
from embedq.workers.launcher import worker_process
from embedq.workers.launcher.stall_detector import Patience
from embedq.workers.launcher.status_table import Lines
from embedq.workers.launcher.worker_process import Child, Event, Reporting
from tests.checkpoints import PATIENCE_S

PATIENCE = Patience(60.0, 300.0, 1_800.0)
BEATING = (sys.executable, "-m", "tests.beating_worker")


class Launcher:
    """What a child reports to: runs its events on the test's thread."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.beats: list[Beat] = []
        self.codes: list[int | None] = []
        self.returned: list[str] = []
        self.reporting = Reporting(self.events.put, self._beat, self._end, self.returned.append, Lines())

    def _beat(self, child: Child, process: subprocess.Popen[bytes], beat: Beat) -> None:
        child.beat = beat
        self.beats.append(beat)

    def _end(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        self.codes.append(process.returncode)

    def run_until_the_end(self) -> int | None:
        """Run what is reported until the process has ended; returns its exit code."""
        while not self.codes:
            self.events.get(timeout=PATIENCE_S)()
        return self.codes.pop()


@pytest.fixture
def launcher() -> Launcher:
    return Launcher()


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    """A worker whose process only beats."""
    monkeypatch.setattr(worker_process, "COMMAND", BEATING)
    child = Child(Device("cpu", 0, "cpu"), "cpu0", PATIENCE)
    yield child
    if child.process and child.process.poll() is None:
        child.process.kill()
        child.process.wait(PATIENCE_S)


def start(child: Child, launcher: Launcher, *beats: dict[str, Any], **variables: str) -> None:
    environment = os.environ | {"BEATS": json.dumps(beats or [{}])} | variables
    child.start(1_000.0, environment, (), launcher.reporting)


def test_beats_are_reported_in_order_and_its_end_at_last(child: Child, launcher: Launcher) -> None:
    assert (child.state, child.is_loading, child.due_s) == ("waiting", True, 0.0)
    start(child, launcher, {"state": LOADING}, {"state": READY, "worker": "fake.cpu0@here"}, BEATING_EXIT="3")
    assert (child.state, child.due_s, child.started_s) == (LOADING, None, 1_000.0)
    assert launcher.run_until_the_end() == 3
    assert [beat.state for beat in launcher.beats] == [LOADING, READY]
    assert (child.is_ready, child.beat.worker) == (True, "fake.cpu0@here")
    child.deadline_s = 5.0
    assert (child.state, child.is_ready) == (DRAINING, False)


def test_a_worker_that_is_killed_is_reported_with_its_signal_and_its_jobs_are_given_back(
    child: Child, launcher: Launcher
) -> None:
    start(child, launcher, {"state": READY, "worker": "fake.cpu0@here"})
    launcher.events.get(timeout=PATIENCE_S)()
    assert child.process
    child.process.send_signal(signal.SIGKILL)
    assert launcher.run_until_the_end() == -signal.SIGKILL
    child.wait_for_return(PATIENCE_S)
    assert launcher.returned == [f"fake.cpu0@here/{child.process.pid}"]


def test_a_beat_that_was_cut_short_is_no_beat(
    child: Child, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os; from embedq.workers.heartbeat_line import *; fd = int(os.environ[VARIABLE]); "
        "os.write(fd, Beat(state=READY).line()); os.write(fd, Beat(state=DRAINING).line()[:-9])"
    )
    monkeypatch.setattr(worker_process, "COMMAND", (sys.executable, "-c", program))
    start(child, launcher)
    assert launcher.run_until_the_end() == 0
    assert [beat.state for beat in launcher.beats] == [READY]


def test_its_process_learns_its_device_and_no_name_meant_for_another(
    child: Child, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("EMBEDQ_DEVICE", "EMBEDQ_DEVICE_LABEL", "EMBEDQ_WORKER_NAME")
    program = (
        "import os; from embedq.workers.heartbeat_line import *; "
        f"os.write(int(os.environ[VARIABLE]), Beat(worker=' '.join(os.environ[n] for n in {names})).line())"
    )
    monkeypatch.setattr(worker_process, "COMMAND", (sys.executable, "-c", program))
    start(child, launcher, EMBEDQ_WORKER_NAME="one for all", EMBEDQ_DEVICE="cuda:7")
    assert launcher.run_until_the_end() == 0
    assert [beat.worker for beat in launcher.beats] == ["cpu cpu0 "]


def test_a_program_that_cannot_be_started_leaves_no_descriptor_open(
    child: Child, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "COMMAND", ("/no/such/program",))
    descriptors = Path("/proc/self/fd")
    before = len([*descriptors.iterdir()])
    with pytest.raises(OSError, match="no/such/program"):
        start(child, launcher)
    assert len([*descriptors.iterdir()]) == before


def test_a_crashed_worker_waits_longer_each_time_and_anew_after_it_ran_for_long() -> None:
    child, now_s = Child(Device("cpu", 0, "cpu"), "cpu0", PATIENCE), 1_000.0
    child.started_s = now_s
    pauses = [child.retry(now_s) for _ in range(8)]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert child.due_s == now_s + 60
    assert child.retry(now_s + 299) == 60
    assert child.retry(now_s + 301) == 1
