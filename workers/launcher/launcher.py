"""Runs the workers of one machine: starts, watches, restarts, replaces, scales and drains them.

    heartbeats, ends of processes     a thread per worker
    lengths of queues                 a thread
    remote control                    a thread          →  one queue of events  →  main thread, which decides
    SIGTERM, SIGINT, SIGHUP

The launcher itself loads neither torch nor a driver, so that a driver reads the environment that each worker is
started with.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from embedq import __version__, tasks
from embedq.core.checkpoint.files import refuse_absent
from embedq.core.devices import Device, read_devices
from embedq.core.errors import InvalidInput, InvalidSettings, OperatorError
from embedq.core.settings import Settings, read_settings
from embedq.workers.exit_codes import EXIT_BROKEN, EXIT_CANNOT_START
from embedq.workers.heartbeat_line import INTERVAL_S, Beat
from embedq.workers.launcher import remote_control, status_table
from embedq.workers.launcher.autoscaler import Autoscaler
from embedq.workers.launcher.device_locks import locked
from embedq.workers.launcher.fleet import Fleet
from embedq.workers.launcher.queue_lengths import BacklogSize, Look
from embedq.workers.launcher.remote_control import Mailbox
from embedq.workers.launcher.rolling_restart import Rolling
from embedq.workers.launcher.scaling_policy import Policy
from embedq.workers.launcher.stall_detector import Patience
from embedq.workers.launcher.worker_process import Child, Event, Reporting
from embedq.workers.logs import counted
from embedq.workers.processes import spawn
from embedq.workers.queues import likely_queues

log = logging.getLogger(__name__)

#: Listing devices loads torch in a process of its own.
_DEVICES_TIMEOUT_S = 120.0

#: If the launcher is this late to look at its workers, it was stopped or starved itself, and kills none of them.
_LATE_S = 3 * INTERVAL_S

#: No worker counts as silent before, however short its lease.
_MIN_SILENT_S = 5.0

#: A worker whose pass hangs notices that itself, a quarter of its limit late at most, and logs why it ends: so it has
#: this many times its limit before the launcher kills it.
_HANG_PART = 1.25

#: Seconds after which a remote-control command fails because the main thread does not answer.
_ANSWER_S = 4.0


@dataclass(frozen=True)
class Plan:
    """The devices of a launcher, the workers on each, and how they are scaled."""

    devices: list[Device]
    per_device: int = 1
    #: Bounds and patience of scaling; None for as many workers as fit.
    policy: Policy | None = None
    #: Whether a worker drains before its successor starts, for devices whose memory holds one only.
    drains_first: bool = False


class Launcher:
    """Runs workers until SIGTERM or SIGINT."""

    def __init__(
        self, plan: Plan, settings: Settings, environment: dict[str, str], give_back: Callable[[str], None]
    ) -> None:
        """`give_back` puts the jobs of a process that has ended back in their queues; see `Reporting`."""
        self.plan = plan
        self._give_back = give_back
        self.settings = settings
        #: As read when this process was started: its own connections are made by it.
        self._wire = dict(tasks.config.wire)
        # Workers use the same, also one that is started after the file has changed.
        self.environment = {f"EMBEDQ_{name.upper()}": str(value) for name, value in self._wire.items()} | environment
        self.num_places = len(plan.devices) * plan.per_device
        if plan.policy and plan.policy.max_workers > self.num_places:
            raise InvalidSettings(
                f"up to {plan.policy.max_workers} workers were asked for and {self.num_places} fit: one on each of "
                f"{len(plan.devices)} devices, or --per-device"
            )
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._code: int | None = None
        #: The last look at queues and workers on the server; None while it does not answer.
        self._look: Look | None = None
        self._started_s = self._ticked_s = time.monotonic()

    def run(self) -> int:
        """Run the workers until SIGTERM or SIGINT, then drain them. Returns the exit code."""
        with contextlib.ExitStack() as stack:
            locks = stack.enter_context(locked(self.plan.devices, self.settings.drain_timeout_s))
            self._listen_to_signals()
            self._screen = stack.enter_context(status_table.fitting())
            self._build(locks)
            for thread in (self._backlog, self._mailbox):
                thread.start()
            stack.callback(lambda: [thread.close() for thread in (self._backlog, self._mailbox)])
            places = [
                f"{device.label}({len(device.cores)} cores)" if device.cores else device.label
                for device in self.plan.devices
            ]
            fields = {"num_workers": self._fleet.wanted, "devices": ",".join(places), "version": __version__}
            log.info("workers are being launched", extra={"action": "launching", **fields})
            try:
                return self._watch()
            finally:
                self._fleet.drain_all()
                log.info("all workers have ended", extra={"action": "launcher_stopped"})

    def _build(self, locks: dict[str, list[int]]) -> None:
        plan, settings = self.plan, self.settings
        reporting = Reporting(self._events.put, self._beat, self._ended, self._give_back, self._screen)
        limits = self._patience(settings), settings.drain_timeout_s
        self._fleet = Fleet(plan.devices, plan.per_device, self.environment, locks, reporting, *limits)
        self._rolling = Rolling(self._fleet, plan.drains_first)
        policy = plan.policy or Policy(self.num_places, self.num_places)
        queues = likely_queues(settings)
        self._autoscaler = Autoscaler(policy, self._fleet, queues, is_on=plan.policy is not None)
        self._fleet.wanted = policy.min_workers
        self._backlog = BacklogSize(queues, lambda found: self._events.put(partial(self._counted, found)))
        self._mailbox = self._mailbox_of(settings)

    def _patience(self, settings: Settings) -> Patience:
        silent_s = max(_MIN_SILENT_S, self._wire["lease_s"])
        return Patience(silent_s, _HANG_PART * settings.hang_timeout_s + silent_s, settings.load_timeout_s)

    def _mailbox_of(self, settings: Settings) -> Mailbox:
        handlers = {
            remote_control.STATUS: partial(self._answer, self._status),
            remote_control.SCALE: partial(self._answer, self._scale),
        }
        return Mailbox(f"{remote_control.PREFIX}{'+'.join(settings.models)}@{socket.gethostname()}", handlers)

    def _watch(self) -> int:
        while self._code is None:
            now_s = time.monotonic()
            if now_s - self._ticked_s >= INTERVAL_S:
                self._tick(now_s)
            self._rolling.step(now_s)
            if not self._rolling.is_under_way:
                self._fleet.settle(now_s)
            self._fleet.start_due(now_s)
            with contextlib.suppress(queue.Empty):
                self._events.get(timeout=self._pause_s())()
        return self._code

    def _tick(self, now_s: float) -> None:
        """Once a second: kill stalled workers, scale, show the status."""
        if now_s - self._ticked_s > _LATE_S:
            self._fleet.excuse(now_s)
        self._ticked_s = now_s
        self._fleet.watch(now_s)
        if self._autoscaler.is_on and self._look is not None and not self._rolling.is_under_way:
            self._autoscaler.step(self._look, now_s)
        self._screen.show(self._rows(), self._caption(now_s), now_s - self._started_s)

    def _pause_s(self) -> float:
        due = [child.due_s for child in self._fleet.children if child.due_s is not None]
        return max(0.0, min([self._ticked_s + INTERVAL_S, *due]) - time.monotonic())

    def _beat(self, child: Child, process: subprocess.Popen[bytes], beat: Beat) -> None:
        if child.process is process:
            self._fleet.beat(child, beat, time.monotonic(), self._look is not None)
            # Of all, because while workers are replaced the old ones may serve other models than the new ones.
            queues = [queue for one in self._fleet.children for queue in one.beat.queues]
            self._backlog.queues = list(dict.fromkeys(queues)) or self._backlog.queues

    def _ended(self, child: Child, process: subprocess.Popen[bytes]) -> None:
        if child.process is process and not self._fleet.ended(child, time.monotonic()):
            log.error("a worker cannot start, so all are stopped; its log is above", extra={"action": "launch_failed"})
            self._code = EXIT_BROKEN if child.has_hung else EXIT_CANNOT_START

    def _counted(self, look: Look | None) -> None:
        self._look = look

    def _listen_to_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._events.put(self._stop))
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it is
            has_terminal = sys.stderr.isatty()
            signal.signal(signal.SIGHUP, lambda *_: self._events.put(partial(self._hang_up, has_terminal)))

    def _stop(self) -> None:
        self._code = 0

    def _hang_up(self, had_terminal: bool) -> None:
        """Read the settings again and replace the workers; or stop, if our terminal was closed."""
        if had_terminal and not os.isatty(2):
            self._stop()
            return
        try:
            settings = self._read_again()
        except OperatorError as error:
            log.error("workers are not replaced, the settings are wrong: %s", error, extra={"action": "replace_failed"})
            return
        self._reload(settings)
        self._rolling.begin()

    def _read_again(self) -> Settings:
        """The settings as they are now. OperatorError names what is wrong, or cannot change while this process runs."""
        settings, wire = read_settings(), tasks.config.read_wire()
        if not settings.models:
            raise InvalidSettings("no model is configured any more")
        refuse_absent(settings.models)
        changed = [f"EMBEDQ_{name.upper()}" for name, value in wire.items() if value != self._wire[name]]
        if changed:
            raise InvalidSettings(f"{', '.join(changed)} changed, which needs a new start of the launcher")
        return settings

    def _reload(self, settings: Settings) -> None:
        """Go by new settings: limits, queues, and the models in this launcher's name. Workers read theirs themselves."""
        before, self.settings = self.settings, settings
        changed = [name for name in Settings.model_fields if getattr(before, name) != getattr(settings, name)]
        changed = [name for name in changed if name != "wire"]
        log.info("the settings were read again", extra={"action": "reloaded", "changed": ",".join(changed) or "none"})
        self._fleet.reload(self._patience(settings), settings.drain_timeout_s)
        queues = likely_queues(settings)
        self._autoscaler.assume(queues)
        self._backlog.queues = list(dict.fromkeys([*queues, *self._backlog.queues]))
        if list(before.models) != list(settings.models):
            self._mailbox.close()
            self._mailbox = self._mailbox_of(settings)
            self._mailbox.start()

    def _answer(self, handler: Callable[..., Any], **arguments: Any) -> Any:
        """Answer a command on the main thread. Called on the remote-control thread."""
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(handler(**arguments))
            except InvalidInput as error:
                answer.set_result({"error": str(error)})
            except Exception as error:  # arguments come from anywhere, and must not end the launcher
                answer.set_exception(error)

        self._events.put(run)
        return answer.result(_ANSWER_S)

    def _status(self) -> dict[str, Any]:
        return {"workers": self._rows(), "caption": self._caption(time.monotonic())}

    def _scale(self, number: int | None) -> dict[str, str]:
        """Run `number` workers from now on; None lets the backlog decide again."""
        if number is None:
            if self.plan.policy is None:
                raise InvalidInput("this launcher was started without --min and --max")
            self._autoscaler.is_on = True
            return {"ok": "the backlog decides"}
        if not isinstance(number, int) or not 0 <= number <= self.num_places:
            raise InvalidInput(f"{number!r:.40} workers were asked for; from 0 to {self.num_places} fit")
        self._autoscaler.is_on = False
        present = len(self._fleet.staying)
        self._fleet.wanted = number
        log.info(
            "the number of workers changes",
            extra={"action": "scaled", "from": present, "to": number, "reason": "asked for"},
        )
        return {"ok": f"{counted(present, 'worker')} become{'s' if present == 1 else ''} {number}"}

    def _rows(self) -> list[dict[str, Any]]:
        return [
            status_table.row(
                child.beat, worker=child.name, device=child.label, model=self._model(child), state=child.state
            )
            for child in self._fleet.children
        ]

    def _model(self, child: Child) -> str:
        """The models that a worker says it serves; before that those it will probably serve."""
        return "+".join(dict.fromkeys(child.beat.queues.values()) or self.settings.models)

    def _caption(self, now_s: float) -> str:
        if self._look is None:
            return "the server does not answer"
        seen = self._autoscaler.seen(self._look, now_s)
        backlog = "unknown" if seen.work_s is None else f"{seen.work_s / max(1, seen.num_ready):.1f} s"
        queued = counted(sum(self._look.queued.values()), "job")
        return f"{queued} in the queues, backlog {backlog}, {counted(self._fleet.wanted, 'worker')} wanted"


def list_devices() -> list[Device]:
    """List the devices of this machine in a process of its own. OperatorError if that fails."""
    command = [sys.executable, "-m", "embedq.core.devices"]
    with spawn(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            answer, reasons = process.communicate(timeout=_DEVICES_TIMEOUT_S)
        except BaseException:
            process.kill()  # SIGINT meanwhile, or a driver that hangs
            raise
    if process.returncode:
        raise OperatorError(f"the devices of this machine cannot be listed: {reasons.decode().strip()[-500:]}")
    return read_devices(answer)
