"""A worker's free memory returns to the system when it is idle, and never between two jobs."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from embedq.core.engine import Engine
from embedq.workers.context import Lifecycle
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.monitoring.heartbeat import Heart
from embedq.workers.monitoring.idle_memory import IdleMemory

MIB = 1 << 20


class Process:
    """Memory of a process that frees what it does not need when it is trimmed."""

    def __init__(self, resident_mib: int, needed_mib: int) -> None:
        self.resident_mib, self.needed_mib = resident_mib, needed_mib
        self.num_trims = 0
        self.memory = IdleMemory(self.trim, lambda: self.resident_mib * MIB)

    def trim(self) -> None:
        self.num_trims += 1
        self.resident_mib = self.needed_mib

    def observe(self, *held: int) -> None:
        for num_held in held:
            self.memory.observe(num_held)


def test_memory_is_returned_after_five_idle_heartbeats_and_once() -> None:
    process = Process(1_800, 500)
    process.observe(3, 1, 0, 0, 0, 0)
    assert process.num_trims == 0
    process.observe(*[0] * 100)
    assert (process.num_trims, process.resident_mib) == (1, 500)


def test_a_worker_that_has_jobs_keeps_its_memory() -> None:
    process = Process(1_800, 500)
    process.observe(*[0, 0, 0, 0, 1] * 20)
    assert process.num_trims == 0


def test_memory_is_returned_again_only_after_it_has_grown() -> None:
    process = Process(1_800, 500)
    process.observe(*[0] * 5)
    process.resident_mib = 540
    process.observe(1, *[0] * 10)
    assert process.num_trims == 1
    process.resident_mib = 600
    process.observe(1, *[0] * 10)
    assert (process.num_trims, process.resident_mib) == (2, 500)


def test_a_worker_that_takes_jobs_watches_its_memory_with_each_heartbeat(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    heart, observed = Heart(Lifecycle(), None), list[int]()

    def observe(num_held: int) -> None:
        observed.append(num_held)
        if len(observed) == 2:
            raise SystemExit  # the only way out

    monkeypatch.setattr(heart._memory, "observe", observe)
    heart.serves("worker", HeldJobs(engine))
    with pytest.raises(SystemExit):
        heart._run()
    assert observed == [0, 0]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc, which alone keeps so much")
def test_what_a_process_freed_leaves_it() -> None:
    """Freed blocks below one that is in use, as large jobs leave them: glibc keeps them by itself."""
    script = """
from embedq.core.batching.device_memory import memory_bytes
from embedq.workers.monitoring.idle_memory import IdleMemory
blocks = [bytearray(100_000) for _ in range(3_000)]
kept = blocks[-1]
del blocks
before = memory_bytes("cpu")[0]
memory = IdleMemory()
for _ in range(5):
    memory.observe(0)
print(before - memory_bytes("cpu")[0])
"""
    environment = {"MALLOC_MMAP_THRESHOLD_": str(64 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 200 * MIB
