"""Shares a CPU's cores among forward passes that run at the same time.

A pass on all cores waits at each of its many operations for the slowest core, and a worker's other work (encoding,
answering, talking to the server) slows one down. Passes on separate parts of the cores do not wait for each other:
more throughput, and a busy neighbour costs far less (docs/measurements.md, "streams").
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Cores per stream, where the settings leave it open and there are enough for two streams.
_CORES_PER_STREAM = 4


def num_streams(asked: int | None, devices: set[str]) -> int:
    """Number of passes that run at once: on a CPU `asked`, by default two or more on several cores; elsewhere one."""
    if devices != {"cpu"}:
        return 1
    if asked:
        return asked
    num_cores = _num_threads()
    return max(min(2, num_cores), num_cores // _CORES_PER_STREAM)


class Cores:
    """Assigns threads to each pass: all of them to a pass that runs alone, otherwise each stream its part."""

    def __init__(self, num_streams: int) -> None:
        self._num_streams = num_streams
        self._lock = threading.Lock()
        self._num_busy = 0
        self._given = threading.local()
        self._num_threads = _num_threads() if num_streams > 1 else 1

    @contextmanager
    def share(self, has_followers: bool) -> Iterator[None]:
        """Run one pass of the calling thread inside. `has_followers`: whether more work waits."""
        if self._num_streams == 1:
            yield
            return
        with self._lock:
            self._num_busy += 1
            is_alone = self._num_busy == 1 and not has_followers
        try:
            self._give(self._num_threads if is_alone else max(1, self._num_threads // self._num_streams))
            yield
        finally:
            with self._lock:
                self._num_busy -= 1

    def _give(self, num_threads: int) -> None:
        if getattr(self._given, "num_threads", None) == num_threads:
            return
        import torch

        torch.get_num_threads()  # a thread's first call sets its number to the process's
        torch.set_num_threads(num_threads)  # of this thread's operations alone; tests/test_cpu_streams.py shows it
        self._given.num_threads = num_threads


def _num_threads() -> int:
    """Threads per operation by default: as the launcher pinned the process, or the number of cores."""
    import torch

    return torch.get_num_threads()
