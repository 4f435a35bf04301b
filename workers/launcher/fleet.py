"""The workers of one launcher: starts, drains, restarts and kills them, so that there are as many as wanted.

Everything runs on the launcher's main thread, with times as arguments; nothing waits. Elsewhere is decided how many
workers are wanted, and when they are replaced.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping, Sequence

from embedq.core.devices import Device
from embedq.workers.exit_codes import EXIT_CANNOT_START
from embedq.workers.heartbeat_line import DRAINING, LOADING, READY, Beat
from embedq.workers.launcher.stall_detector import Patience
from embedq.workers.launcher.worker_process import Child, Reporting
from embedq.workers.processes import finish

log = logging.getLogger(__name__)

#: Failed starts in a row after which the launcher ends, if other workers could start or the worker hung while it
#: loaded: what it needs may be back soon. If none has ever started, the first failure ends it: the settings are wrong.
_MAX_REFUSALS = 3

#: Seconds that the launcher waits, before it ends, for the jobs of workers that it killed to return to their queues.
_RETURN_S = 5.0


class Fleet:
    """Workers on devices."""

    def __init__(
        self,
        devices: Sequence[Device],
        per_device: int,
        environment: dict[str, str],
        locks: Mapping[str, Sequence[int]],
        reporting: Reporting,
        patience: Patience,
        drain_timeout_s: float,
    ) -> None:
        self.children: list[Child] = []
        #: How many workers there should be.
        self.wanted = 0
        #: Seconds from a start to the first job, as last seen.
        self.load_s = 0.0
        self._devices = devices
        self._per_device = per_device
        self._environment = environment
        self._locks = locks
        self._reporting = reporting
        self._patience = patience
        self._drain_timeout_s = drain_timeout_s
        self._was_ready = False

    def reload(self, patience: Patience, drain_timeout_s: float) -> None:
        """Take new limits: that of draining for all workers from now on, those of a stall for processes started from now on.

        A process that runs has limits of its own from its start: killed by shorter ones, it could be in the middle of a pass
        that it may still take.
        """
        self._patience = patience
        self._drain_timeout_s = drain_timeout_s

    @property
    def num_places(self) -> int:
        """The number of workers that fit."""
        return len(self._devices) * self._per_device

    @property
    def staying(self) -> list[Child]:
        """The workers that count: all but those that drain, or will once their successors are ready."""
        return [child for child in self.children if child.deadline_s is None and not child.successor]

    def settle(self, now_s: float) -> None:
        """Add or drain workers until there are as many as wanted."""
        staying = self.staying
        for child in reversed(staying[self.wanted :]):
            self.drain(child, now_s)
        for _ in range(self.wanted - len(staying)):
            device = self._free_device()
            if device is None:  # one still drains there
                break
            self.add(device)

    def start_due(self, now_s: float) -> None:
        """Start new workers, and crashed ones whose pause is over."""
        for child in self.children:
            if child.due_s is not None and child.due_s <= now_s:
                self._start(child, now_s)

    def add(self, device: Device) -> Child:
        """Add a worker on `device`; the next `start_due` starts it."""
        taken = {child.label for child in self.children}
        labels = [device.label, *(f"{device.label}-{number}" for number in range(2, len(taken) + 3))]
        child = Child(device, next(label for label in labels if label not in taken), self._patience)
        self.children.append(child)
        return child

    def drain(self, child: Child, now_s: float) -> None:
        """Make a worker finish its jobs, within the bound, and end."""
        if child.process is None:
            self.children.remove(child)
            return
        if child.deadline_s is None:
            child.deadline_s = now_s + self._drain_timeout_s
            child.process.terminate()

    def beat(self, child: Child, beat: Beat, now_s: float, is_server_up: bool) -> None:
        """Record a worker's heartbeat."""
        last, child.beat = child.beat, beat
        child.name = beat.worker or child.name
        child.progress.beat(beat, now_s, is_server_up)
        if beat.state == READY and last.state == LOADING:
            self._was_ready = True
            child.num_refusals = 0
            self.load_s = now_s - child.started_s
            log.info(
                "a worker takes jobs",
                extra={"action": "worker_up", "worker": child.name, "after_s": round(self.load_s, 1)},
            )
        if beat.state == DRAINING and child.deadline_s is None:  # somebody else drains it: the bound holds all the same
            child.deadline_s = now_s + self._drain_timeout_s
            if not child.successor:
                self.wanted = max(0, self.wanted - 1)

    def watch(self, now_s: float) -> None:
        """Kill workers that are stalled or have not drained in time; that works on a stopped process, too."""
        for child in self.children:
            if child.process is None or child.process.poll() is not None:
                continue
            if child.deadline_s is not None:
                if now_s > child.deadline_s:
                    self._kill(child, "worker_drain_timeout", f"not drained in {self._drain_timeout_s:.0f} s")
                continue
            reason = child.progress.standstill(now_s, child.patience)
            if reason:
                child.has_hung = child.progress.is_loading
                self._kill(child, "worker_stalled", reason)

    def ended(self, child: Child, now_s: float) -> bool:
        """Remove or restart the worker of a process that ended; False if no worker can be expected to start."""
        assert child.process
        code, child.process = child.process.wait(), None
        fields = {"device": child.label, "code": code}
        if code == 0 or child.deadline_s is not None or child.successor:
            if child.deadline_s is None and not child.successor:
                self.wanted = max(0, self.wanted - 1)  # somebody else drained it
            self.children.remove(child)
            log.info("a worker ended", extra={"action": "worker_ended", **fields})
            return True
        if code == EXIT_CANNOT_START or child.has_hung:
            child.num_refusals += 1
            is_wrong = not self._was_ready and not child.has_hung
            if is_wrong or child.num_refusals >= _MAX_REFUSALS:
                return False
        if child.is_successor:  # who replaces workers gives up, and says so
            log.error("a worker's successor ended", extra={"action": "successor_ended", **fields})
            return True
        log.error(
            "a worker crashed and is restarted; its jobs go to other workers",
            extra={"action": "worker_crashed", **fields, "in_s": child.retry(now_s)},
        )
        return True

    def excuse(self, now_s: float) -> None:
        """Restart the clocks of every worker: the launcher itself was asleep."""
        for child in self.children:
            child.progress.excuse(now_s)

    def drain_all(self) -> None:
        """Send SIGTERM to all, then wait for each; a worker that exceeds the bound is killed, its jobs return."""
        for child in self.children:
            if child.process and child.process.poll() is None and child.deadline_s is None:
                child.process.terminate()
        deadline_s = time.monotonic() + self._drain_timeout_s
        for child in self.children:
            if child.process:
                finish(child.process, max(0.1, deadline_s - time.monotonic()))
        deadline_s = time.monotonic() + _RETURN_S
        for child in self.children:
            child.wait_for_return(max(0.0, deadline_s - time.monotonic()))

    def _start(self, child: Child, now_s: float) -> None:
        fields: dict[str, object] = {"device": child.label}
        try:
            child.patience = self._patience
            pid = child.start(now_s, self._environment, self._locks.get(child.device.label, ()), self._reporting)
        except OSError as error:  # too many processes, or no memory for one: later there may be
            fields |= {"action": "worker_start_failed", "in_s": child.retry(now_s)}
            log.error("a worker's process cannot be started: %s", error.strerror, extra=fields)
            return
        log.info("a worker was started", extra={"action": "worker_started", **fields, "pid": pid})

    def _free_device(self) -> Device | None:
        """The device with the fewest workers, the first of those; None if all are full."""
        counts = [sum(child.device is device for child in self.children) for device in self._devices]
        fewest = min(counts, default=self._per_device)
        return self._devices[counts.index(fewest)] if fewest < self._per_device else None

    def _kill(self, child: Child, action: str, reason: str) -> None:
        assert child.process
        log.error("a worker is killed: %s", reason, extra={"action": action, "worker": child.name})
        child.process.send_signal(signal.SIGKILL)
