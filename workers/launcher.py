"""One pinned worker process per device: started, watched, restarted after a crash, drained.

The launcher itself loads neither torch nor a driver, so that each worker's environment is the
first thing a driver of its process reads.
"""

from __future__ import annotations

import logging
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

from core.devices import Device, read_devices
from core.errors import OperatorError
from core.settings import Settings
from workers.processes import spawn, stop
from workers.worker import EXIT_CANNOT_START

log = logging.getLogger(__name__)

#: Pause before the first restart of a crashed worker; doubled up to the longest, and forgotten
#: after the worker has run for `_STEADY_S`.
_FIRST_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 60.0
_STEADY_S = 300.0

#: Listing devices loads torch in a process of its own.
_DEVICES_TIMEOUT_S = 120.0


@dataclass
class Child:
    """One device and the worker process on it."""

    device: Device
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    backoff_s: float = _FIRST_BACKOFF_S
    #: When to start it (again); None while it runs, or once it ended on request.
    due_s: float | None = field(default=0.0)


class Launcher:
    """Runs one worker per device until told to stop."""

    def __init__(self, devices: list[Device], settings: Settings, environment: dict[str, str]) -> None:
        self.children = [Child(device) for device in devices]
        self.settings = settings
        self.environment = environment
        #: What happened: a child that ended, or None when we are told to stop.
        self._events: queue.SimpleQueue[Child | None] = queue.SimpleQueue()

    def run(self) -> int:
        """Start all workers, keep them running, drain them on SIGTERM or SIGINT. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._events.put(None))
        log.info("launching", extra={"action": "launching", "num_workers": len(self.children)})
        try:
            return self._watch()
        finally:
            self._drain()

    def _watch(self) -> int:
        while any(child.process or child.due_s is not None for child in self.children):
            self._start_due()
            try:
                event = self._events.get(timeout=self._pause_s())
            except queue.Empty:
                continue
            if event is None:
                return 0
            if self._ended(event) == EXIT_CANNOT_START:
                log.error(
                    "a worker cannot start, so all are stopped; its reason is above", extra={"action": "launch_failed"}
                )
                return EXIT_CANNOT_START
        return 0

    def _start_due(self) -> None:
        now_s = time.monotonic()
        for index, child in enumerate(self.children):
            if child.due_s is None or child.due_s > now_s:
                continue
            environment = self.environment | child.device.environment()
            environment |= {"EMBEDQ_DEVICE": child.device.kind, "EMBEDQ_DEVICE_LABEL": child.device.label}
            command = [sys.executable, "-m", "workers.worker"]
            child.process = spawn(command, environment, cores=child.device.cores)
            child.started_s, child.due_s = now_s, None
            log.info(
                "worker started",
                extra={"action": "worker_started", "device": child.device.label, "pid": child.process.pid},
            )
            threading.Thread(target=self._wait, args=(child, child.process), name=f"wait-{index}", daemon=True).start()

    def _wait(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._events.put(child)

    def _ended(self, child: Child) -> int:
        """Decide what follows the end of a worker; returns its exit code."""
        assert child.process
        code, child.process = child.process.wait(), None
        if code in (0, EXIT_CANNOT_START):
            log.info("worker ended", extra={"action": "worker_ended", "device": child.device.label, "code": code})
            return code
        if time.monotonic() - child.started_s > _STEADY_S:
            child.backoff_s = _FIRST_BACKOFF_S
        child.due_s = time.monotonic() + child.backoff_s
        log.error(
            "worker crashed and is started again; its jobs go to other workers",
            extra={"action": "worker_crashed", "device": child.device.label, "code": code, "in_s": child.backoff_s},
        )
        child.backoff_s = min(2 * child.backoff_s, _LONGEST_BACKOFF_S)
        return code

    def _pause_s(self) -> float | None:
        due = [child.due_s for child in self.children if child.due_s is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _drain(self) -> None:
        """SIGTERM to all at once, then wait for each; what exceeds the bound is killed, its jobs return."""
        running = [child.process for child in self.children if child.process]
        for process in running:
            if process.poll() is None:
                process.terminate()
        deadline_s = time.monotonic() + self.settings.drain_timeout_s
        for process in running:
            stop(process, max(0.1, deadline_s - time.monotonic()))
        log.info("all workers have ended", extra={"action": "launcher_stopped"})


def list_devices() -> list[Device]:
    """The devices of this machine, asked in a process of its own. OperatorError if that fails."""
    command = [sys.executable, "-m", "core.devices"]
    with spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            answer, reasons = process.communicate(timeout=_DEVICES_TIMEOUT_S)
        except BaseException:
            process.kill()  # told to stop meanwhile, or a driver that hangs
            raise
    if process.returncode:
        raise OperatorError(f"the devices of this machine cannot be listed: {reasons.decode().strip()[-500:]}")
    return read_devices(answer)
