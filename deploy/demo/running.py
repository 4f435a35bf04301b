"""Starts the demo's processes, and ends all of them with the demo.

Knows signals, child processes and their log files; not what the processes are for.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

from embedq.core.errors import OperatorError
from embedq.workers.processes import spawn, stop

#: Between two looks into a child's log: it has no other way to tell us, and this is not noticed.
_POLL_S = 0.05

#: Until a signal that Python dropped is raised again.
_AGAIN_S = 0.01

#: Lines of a child's log shown when it fails.
_TAIL_LINES = 15

#: A child must have said what we wait for by then; a model from a slow disk takes a minute.
_START_TIMEOUT_S = 180.0

#: Ctrl-C, and what a supervisor sends.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_T = TypeVar("_T")


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. A BaseException, so that no library takes it for an error of its own."""


class Running(contextlib.ExitStack):
    """Holds everything that was started; leaving it ends all of that, newest first.

    SIGINT and SIGTERM raise `Interrupted` in the main thread and are swallowed here, after the
    clean-up. They wait while something is being started or ended: cut short there, a process would
    be left that nobody knows of. `exit_code` tells what arrived.
    """

    def __init__(self) -> None:
        super().__init__()
        self._number = 0
        self._is_held = False

    def __enter__(self) -> Running:
        for number in _SIGNALS:
            signal.signal(number, self._receive)
        signal.signal(signal.SIGALRM, lambda _, frame: self._receive(self._number, frame))
        sys.unraisablehook = self._dropped
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._is_held = True
        if kind is Interrupted:
            print("\nstopping; jobs that workers have taken are finished first", file=sys.stderr)
        try:
            return bool(super().__exit__(kind, error, trace)) or kind is Interrupted
        finally:
            for number in (*_SIGNALS, signal.SIGALRM):  # all that is left is Python's own exit, and its code is decided
                signal.signal(number, signal.SIG_IGN)

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as a shell reports it; 0 if none arrived."""
        return 128 + self._number if self._number else 0

    def start(self, context: contextlib.AbstractContextManager[_T]) -> _T:
        """Enter `context`, wholly or not at all; it is left when we are."""
        self._is_held = True
        started = self.enter_context(context)
        self._is_held = False
        self.check()
        return started

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived: while held, or where Python drops an exception."""
        if self._number:
            self._is_held = True
            raise Interrupted

    def _dropped(self, dropped: sys.UnraisableHookArgs) -> None:
        """Python dropped an exception, for example one in a `__del__`: ours is raised again, where it is heard."""
        if dropped.exc_type is Interrupted:
            self._is_held = False
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            sys.__unraisablehook__(dropped)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._number = self._number or number
        if not self._is_held:
            self._is_held = True  # raised once: a second Ctrl-C must not cut the clean-up short
            raise Interrupted


class Child:
    """A process whose output goes to a log file. A context manager that stops it.

    `stop_timeout_s` is how long it may take to end by itself before it is killed.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: dict[str, str], stop_timeout_s: float
    ) -> None:
        self.name = name
        self.command = command
        self.log = log
        self.environment = environment
        self.stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Child:
        with self.log.open("wb") as output:
            self._process = spawn(self.command, self.environment, stdout=output, stderr=output)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process
        stop(self._process, self.stop_timeout_s)
        # Told to stop very early, it may have left a process it was waiting for; those in its group
        # are such, since everything meant to last has a session of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait_for(self, text: str, count: int = 1) -> list[str]:
        """Wait until `count` lines of its log hold `text`, and return them. OperatorError as in `check`."""
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while True:
            has_ended = self._has_ended()  # asked before reading: its last words count
            found = [line for line in self._lines() if text in line]
            if len(found) >= count:
                return found
            if has_ended:
                self.check()
            if time.monotonic() > deadline_s:
                raise OperatorError(f"{self.name} did not start within {_START_TIMEOUT_S:.0f} s; {self._tail()}")
            time.sleep(_POLL_S)

    def check(self) -> None:
        """OperatorError with the end of its log if it has ended."""
        if self._has_ended():
            assert self._process
            raise OperatorError(f"{self.name} ended with code {self._process.returncode}; {self._tail()}")

    def wait(self) -> None:
        """Wait for its end, which nobody asked for: OperatorError as in `check`."""
        assert self._process
        self._process.wait()
        self.check()

    def _has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8", errors="replace").splitlines()

    def _tail(self) -> str:
        return f"the end of {self.log}:\n" + "\n".join(self._lines()[-_TAIL_LINES:])
