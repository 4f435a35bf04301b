"""One worker of a launcher: its device, its process, its last heartbeat, and when it is restarted.

Only the launcher's main thread starts and stops it. A thread per process reads its heartbeats and waits for its end,
and reports both to the main thread.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial

from embedq.core.devices import Device
from embedq.core.guarded_thread import GuardedThread
from embedq.workers.heartbeat_line import DRAINING, LOADING, READY, VARIABLE, Beat
from embedq.workers.launcher.stall_detector import Patience, Progress
from embedq.workers.launcher.status_table import Lines
from embedq.workers.processes import spawn

log = logging.getLogger(__name__)

#: Pause before the first restart of a crashed worker; doubled up to the longest, and forgotten
#: after the worker has run for `_STEADY_S`.
_FIRST_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 60.0
_STEADY_S = 300.0

#: The command of a worker.
COMMAND = (sys.executable, "-m", "embedq.workers.worker")

#: An action for the launcher's main thread.
Event = Callable[[], None]


class Child:
    """A worker: one process after another on one device, under one name."""

    def __init__(self, device: Device, label: str, patience: Patience) -> None:
        self.device = device
        #: When its process counts as stalled.
        self.patience = patience
        #: The device's part of the worker's name; unlike the device's own where several workers share it.
        self.label = label
        #: The worker's name, also while its next process loads; its label before the first is ready.
        self.name = label
        self.process: subprocess.Popen[bytes] | None = None
        self.beat = Beat()
        self.progress = Progress(0.0)
        self.started_s = 0.0
        #: When to start it (again); None while it runs.
        self.due_s: float | None = 0.0
        #: When it is killed if it has not drained; None unless it drains.
        self.deadline_s: float | None = None
        #: The worker that replaces it once ready, and already counts instead of it among those wanted.
        self.successor: Child | None = None
        #: Whether it takes the place of another in a rolling restart: it may serve another revision than the others do.
        self.is_successor = False
        #: How often in a row it could not start, and whether the last time because it hung while it loaded.
        self.num_refusals = 0
        self.has_hung = False
        self._backoff_s = _FIRST_BACKOFF_S
        self._follower: GuardedThread | None = None

    @property
    def state(self) -> str:
        """The worker's own state, or "waiting" between a crash and the next start."""
        if self.process is None:
            return "waiting"
        return DRAINING if self.deadline_s is not None else self.beat.state

    @property
    def is_ready(self) -> bool:
        """True while it takes jobs."""
        return self.state == READY

    @property
    def is_loading(self) -> bool:
        """True while it will take jobs, but does not yet."""
        return self.state in ("waiting", LOADING)

    def start(self, now_s: float, environment: dict[str, str], locks: Sequence[int], reporting: Reporting) -> int:
        """Start its process and return the process id. Only the main thread may call it, see `spawn`."""
        reading, writing = os.pipe()
        environment = environment | self.device.environment()
        environment |= {
            "EMBEDQ_DEVICE": self.device.kind,
            "EMBEDQ_DEVICE_LABEL": self.label,
            "EMBEDQ_WORKER_NAME": "",  # a name for one worker is not for all of a launcher
            VARIABLE: str(writing),
        }
        if self.is_successor:
            environment["EMBEDQ_REPLACE_REVISION"] = "true"
        try:
            self.process = spawn(
                COMMAND, environment, self.device.cores, pass_fds=(writing, *locks), **reporting.screen.popen
            )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        reporting.screen.follow(self.process)
        self.beat, self.progress, self.has_hung = Beat(), Progress(now_s), False
        self.started_s, self.due_s = now_s, None
        follow = partial(self._follow, self.process, reading, reporting)
        self._follower = GuardedThread(f"follow-{self.label}", follow, partial(self._lost, self.process, reporting))
        self._follower.start()
        return self.process.pid

    def retry(self, now_s: float) -> float:
        """Schedule its next start; returns in how many seconds."""
        if now_s - self.started_s > _STEADY_S:
            self._backoff_s = _FIRST_BACKOFF_S
        backoff_s, self._backoff_s = self._backoff_s, min(2 * self._backoff_s, _LONGEST_BACKOFF_S)
        self.due_s = now_s + backoff_s
        return backoff_s

    def wait_for_return(self, timeout_s: float) -> None:
        """Wait until the jobs of its last process, which has ended, are back in their queues, or the time is over."""
        if self._follower:
            self._follower.join(timeout_s)

    def _follow(self, process: subprocess.Popen[bytes], reading: int, reporting: Reporting) -> None:
        worker = ""
        with os.fdopen(reading, "rb") as beats:
            for line in beats:
                if not line.endswith(b"\n"):  # killed in the middle of it
                    break
                try:
                    beat = Beat.read(line)
                except ValueError:  # a release whose lines are none of ours; without any it counts as silent
                    log.warning(
                        "a heartbeat cannot be read", extra={"action": "heartbeat_refused", "device": self.label}
                    )
                    continue
                worker = beat.worker or worker
                reporting.events(partial(reporting.on_beat, self, process, beat))
        process.wait()
        reporting.events(partial(reporting.on_end, self, process))
        if worker:  # else it has not begun to take jobs
            reporting.give_back(f"{worker}/{process.pid}")

    def _lost(self, process: subprocess.Popen[bytes], reporting: Reporting, reason: str) -> None:
        """Nobody follows this process any more: end it, so that another one takes its place."""
        log.error("a worker is killed: %s", reason, extra={"action": "worker_unfollowed", "device": self.label})
        process.kill()
        process.wait()
        reporting.events(partial(reporting.on_end, self, process))


class Reporting:
    """Receives heartbeats and the end of a worker's process from the thread that follows it, and shows the process's output."""

    def __init__(
        self,
        events: Callable[[Event], None],
        on_beat: Callable[[Child, subprocess.Popen[bytes], Beat], None],
        on_end: Callable[[Child, subprocess.Popen[bytes]], None],
        give_back: Callable[[str], None],
        screen: Lines,
    ) -> None:
        """`give_back` gets the name of a process that has ended, as leases have it; it is called on the following thread."""
        self.events = events
        self.on_beat = on_beat
        self.on_end = on_end
        self.give_back = give_back
        self.screen = screen
