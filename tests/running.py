"""Real processes under test: start one, wait for a line it prints, stop it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from embedq.workers.processes import spawn, stop

ROOT = Path(__file__).parent.parent

#: Loading torch, transformers and a small model on a busy two-core machine.
START_TIMEOUT_S = 90.0


class Running:
    """A child process whose output is collected; a context manager that stops it."""

    def __init__(
        self, command: Sequence[str], environment: dict[str, str] | None = None, directory: Path = ROOT
    ) -> None:
        self.process = spawn(
            command,
            {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._has_ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def output(self) -> str:
        """Everything printed so far."""
        with self._changed:
            return "\n".join(self.lines)

    def wait_for(self, text: str, count: int = 1, timeout_s: float = START_TIMEOUT_S) -> list[str]:
        """Wait until `count` lines hold `text`, and return them. AssertionError with the output if not."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while len(found := [line for line in self.lines if text in line]) < count:
                left_s = deadline_s - time.monotonic()
                if self._has_ended or left_s <= 0:
                    raise AssertionError(
                        f"{text!r} was not printed {count} times; the output was:\n" + "\n".join(self.lines)
                    )
                self._changed.wait(left_s)
            return found

    def wait(self, timeout_s: float = START_TIMEOUT_S) -> int:
        """Wait for the end; returns the exit code, with all output collected."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def stop(self, timeout_s: float = 60.0) -> int:
        """End it with SIGTERM and wait; returns the exit code, with all output collected."""
        code = stop(self.process, timeout_s)
        self._reader.join(timeout_s)
        return code

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.decode(errors="replace").rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()
        self.process.stdout.close()


def start_workers(environment: dict[str, str], *arguments: str) -> Running:
    """`python -m embedq.workers`, returned once every worker is ready. The caller stops it."""
    running = Running([sys.executable, "-m", "embedq.workers", *arguments], environment)
    try:
        launching = running.wait_for("action=launching")[0]
        running.wait_for("action=worker_ready", count=int(launching.partition("num_workers=")[2].split()[0]))
    except BaseException:
        running.stop()
        raise
    return running


def children_of(pid: int) -> set[int]:
    """Process ids whose parent is `pid` now (Linux)."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # it ended while we looked
            continue
        if int(text.rpartition(")")[2].split()[1]) == pid:
            found.add(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether a process of this id exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def require(is_present: bool, reason: str) -> None:
    """Skip on a laptop, fail in CI: there everything must be tested."""
    import pytest

    if not is_present:
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
