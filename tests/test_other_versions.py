"""A launcher and a worker of another version: its heartbeats are read, its end is seen, whatever it writes."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from embedq.core.devices import Device
from embedq.workers.heartbeat_line import READY, Beat
from embedq.workers.launcher import worker_process
from embedq.workers.launcher.stall_detector import Patience
from embedq.workers.launcher.status_table import Lines
from embedq.workers.launcher.worker_process import Child, Event, Reporting
from tests.test_records import RECORDS

TIMEOUT_S = 30.0

#: A worker that writes the lines it is given, and stays until it is killed unless it is to end.
WRITES = """
import os, sys, time
os.write(int(os.environ["EMBEDQ_HEARTBEAT_FD"]), sys.argv[1].encode())
time.sleep(0 if len(sys.argv) > 2 else 300)
"""


class Launched:
    """One worker's process and what its launcher hears of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lines: str, *stay: str) -> None:
        monkeypatch.setattr(worker_process, "COMMAND", (sys.executable, "-c", WRITES, lines, *stay))
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.beats: list[Beat] = []
        self.num_ends = 0
        self.child = Child(Device("cuda", 0, ""), "cuda0", Patience(TIMEOUT_S, TIMEOUT_S, TIMEOUT_S))
        reporting = Reporting(self.events.put, self._beat, self._end, list[str]().append, Lines())
        self.child.start(time.monotonic(), {}, (), reporting)

    def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            self.events.get(timeout=TIMEOUT_S)()

    def _beat(self, child: Child, process: subprocess.Popen[bytes], beat: Beat) -> None:
        self.beats.append(beat)

    def _end(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        self.num_ends += 1


def test_a_worker_of_a_newer_release_is_followed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = json.loads(Beat(READY, "m.cuda0@host").line()) | {"wings": 2, "version": "9.0"}
    launched = Launched(monkeypatch, json.dumps(newer) + "\nno heartbeat\n" + json.dumps(newer) + "\n", "ends")
    launched.until(lambda: launched.num_ends)
    assert [(beat.state, beat.version) for beat in launched.beats] == [(READY, "9.0")] * 2


def test_a_worker_of_the_previous_release_is_followed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = Launched(monkeypatch, "".join(RECORDS["heartbeats"]), "ends")
    launched.until(lambda: launched.num_ends)
    assert [beat.num_jobs for beat in launched.beats] == [0, 3]


def test_a_worker_that_nobody_follows_any_more_is_ended_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(line: bytes) -> Beat:
        raise SystemError("a bug")

    monkeypatch.setattr(Beat, "read", broken)
    launched = Launched(monkeypatch, Beat().line().decode())
    launched.until(lambda: launched.num_ends)
    assert launched.child.process
    assert launched.child.process.wait(TIMEOUT_S) == -9
