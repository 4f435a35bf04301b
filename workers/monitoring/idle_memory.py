"""Returns memory that the allocator keeps and nothing uses to the kernel, once a worker has been idle for some seconds.

glibc keeps what passes and large jobs free, in the arena of each thread: to map and clear it anew in every operation
would cost speed (`core.devices`). Idle, nothing is gained by it, and one large job would leave a gigabyte for good.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable

from embedq.core.batching.device_memory import memory_bytes

log = logging.getLogger(__name__)

#: Observations without jobs, a heartbeat apart, before memory is returned: between two jobs of a busy worker it stays.
_NUM_IDLE = 5

#: Memory is returned once it has grown by so much since the last time, so that small jobs now and then cost nothing.
_GROWTH_BYTES = 64 << 20


class IdleMemory:
    """Watches one process's memory. For one thread: the heartbeat's."""

    def __init__(self, trim: Callable[[], None] | None = None, resident_bytes: Callable[[], int] | None = None) -> None:
        """`trim` returns memory to the kernel and `resident_bytes` is what the process has; None for the real ones."""
        self._trim = trim or _glibc_trim()
        self._resident_bytes = resident_bytes or (lambda: memory_bytes("cpu")[0])
        self._num_idle = 0
        self._lowest_bytes = 0

    def observe(self, num_held: int) -> None:
        """Note how many jobs the worker holds now, and return memory if it has been idle long enough."""
        self._num_idle = 0 if num_held else self._num_idle + 1
        if self._trim is None or self._num_idle < _NUM_IDLE:
            return
        before_bytes = self._resident_bytes()
        if before_bytes < self._lowest_bytes + _GROWTH_BYTES:
            return
        begun_s = time.monotonic()
        self._trim()
        self._lowest_bytes = self._resident_bytes()
        fields = {"before_bytes": before_bytes, "after_bytes": self._lowest_bytes}
        log.debug(
            "free memory was returned to the system",
            extra={"action": "trimmed", "seconds": round(time.monotonic() - begun_s, 3), **fields},
        )


def _glibc_trim() -> Callable[[], None] | None:
    """glibc's `malloc_trim(0)`, which walks all arenas; None for other C libraries, which return memory by themselves."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None

    def trimmed() -> None:
        trim(0)

    return trimmed
