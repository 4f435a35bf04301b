"""The workers under attack: which of them serve now, and what each holds."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import redis

from tests.chaos.light_worker import ALIAS
from tests.running import Running

#: Seconds of a lease: short, so that a run has time for many.
LEASE_S = 2

#: Passes are small and slow beside them, so that workers hold jobs, some tens each, at any moment.
_SETTINGS = {
    "EMBEDQ_MODELS": f"{ALIAS}={Path(__file__).parent}",  # any directory: nothing is loaded from it
    "EMBEDQ_MAX_BATCH_TOKENS": "288",
    "EMBEDQ_WINDOW_BATCHES": "8",
    "EMBEDQ_LEASE_S": str(LEASE_S),
    "EMBEDQ_MAX_DEAD_LETTERS": "100000",
    "EMBEDQ_DRAIN_TIMEOUT_S": "15",
}


class Fleet:
    """Workers that are started again when they die. A context manager."""

    def __init__(self, url: str, directory: Path, num_workers: int, **environment: str) -> None:
        self.notes = directory / "notes"
        self.notes.mkdir()
        self.num_workers = num_workers
        given = {"EMBEDQ_REDIS_URL": url, "EMBEDQ_CONFIG": "", "CHAOS_NOTES": str(self.notes)}
        self._running = Running(
            [sys.executable, "-m", "tests.chaos.light_worker", str(num_workers)], _SETTINGS | given | environment
        )
        self._num_lines = 0
        #: Worker (as leases name it) by process id, of those that serve.
        self.serving: dict[int, str] = {}
        #: Exit code of each worker that ended; negative for a signal.
        self.ended: dict[int, int] = {}

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        """Let all finish and end; returns the exit code of the process that kept them running."""
        return self._running.stop()

    @property
    def output(self) -> str:
        """Everything the workers printed."""
        return self._running.output

    def wait_until_serving(self, num_workers: int, timeout_s: float = 60.0) -> list[int]:
        """Process ids of those that serve, once there are so many. AssertionError with the output if not."""
        deadline_s = time.monotonic() + timeout_s
        while len(self.look()) < num_workers:
            left_s = deadline_s - time.monotonic()
            self._running.wait_for("action=worker_ready", self._num_ready + 1, timeout_s=max(0.0, left_s))
        return sorted(self.serving)

    def look(self) -> dict[int, str]:
        """`serving`, by all that has been printed so far."""
        lines = self._running.lines[self._num_lines :]
        self._num_lines += len(lines)
        for line in lines:
            fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
            if "action=worker_ready" in line:
                self.serving[int(fields["pid"])] = f"{fields['worker']}/{fields['pid']}"
            elif "action=light_worker_ended" in line:
                self.serving.pop(int(fields["pid"]), None)
                self.ended[int(fields["pid"])] = int(fields["status"])
        return self.serving

    def send_signal(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to one; one that is killed, or stopped, serves no longer."""
        os.kill(pid, number)
        if number in (signal.SIGKILL, signal.SIGSTOP):
            self.serving.pop(pid, None)

    @property
    def _num_ready(self) -> int:
        return sum("action=worker_ready" in line for line in self._running.lines[: self._num_lines])


def held_by(client: redis.Redis, worker: str) -> dict[str, float]:
    """Jobs that the server says `worker` holds: by tag, when it took them."""
    with client.pipeline() as pipe:
        records, in_flight = pipe.hgetall("embedq:jobs").hkeys("unacked").execute()
    last = {tag: records[tag].rpartition(b"\n")[2].split(b"\t") for tag in in_flight if tag in records}
    return {tag.decode(): int(line[0]) / 1e6 for tag, line in last.items() if line[3].decode() == worker}
