"""A device's memory: which errors mean that it is full, how much is free, what a batch may take of it.

Comes in: errors of a forward pass, bytes that a device reports. Goes out: budgets in tokens. Knows
nothing of models or batches. torch is used where a model has loaded it already, and never loaded here.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import Any

#: Part of the free memory that batches may take. The rest is for what the measured batch did not
#: show: texts in worse proportions, an allocator's fragments, the driver.
USABLE_PART = 0.85

#: Out of memory never takes the budget below this many tokens. Full memory may be another process's
#: doing and over in a second; without a limit it would leave a worker that runs texts one by one for good.
MIN_BUDGET_TOKENS = 256

#: What CUDA, Ascend, Moore Threads and Apple ("out of memory"), torch's CPU allocator on Linux and elsewhere,
#: the C++ library, and cuBLAS and cuDNN say when an allocation failed. In lower case.
_SAYINGS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "bad_alloc",
    "status_alloc_failed",
)

#: What a backend must offer for its memory to be measured.
_MEASURING = ("mem_get_info", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a failed allocation, by its class or, from backends without one, by its message."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)


def free_cache(device: str) -> None:
    """Give memory that torch holds but no tensor uses back to `device`."""
    gc.collect()  # frames of a failed pass may hold each other, and its tensors
    empty_cache = getattr(_backend(device), "empty_cache", None)
    if empty_cache is not None:
        # A device that is broken beyond its memory says so at the next pass, where the error has a job to go to.
        with contextlib.suppress(RuntimeError):
            empty_cache()


def reduced_budget(max_tokens: int, failed_tokens: int) -> int:
    """The budget after a batch of `failed_tokens`, padding included, did not fit: a quarter less than those.

    Never more than `max_tokens`. Of sequences without padding one may be longer than what is left: it runs alone.
    """
    return min(max_tokens, max(MIN_BUDGET_TOKENS, failed_tokens * 3 // 4))


def fitting_budget(max_tokens: int, free_bytes: int, bytes_per_token: float) -> int:
    """The tokens that fit the usable part of `free_bytes`, at most `max_tokens`."""
    if bytes_per_token <= 0:
        return max_tokens
    return min(max_tokens, max(MIN_BUDGET_TOKENS, int(free_bytes * USABLE_PART / bytes_per_token)))


class DeviceMemory:
    """The memory of one accelerator, as torch's backend for it reports."""

    def __init__(self, device: str, backend: Any) -> None:
        self._device = device
        self._backend = backend
        self._allocated_bytes = 0

    def start(self) -> None:
        """Begin to measure."""
        self._backend.reset_peak_memory_stats(self._device)
        self._allocated_bytes = int(self._backend.memory_allocated(self._device))

    def taken_bytes(self) -> int:
        """The most that tensors took at one time since `start`, without what they held before."""
        return int(self._backend.max_memory_allocated(self._device)) - self._allocated_bytes

    def free_bytes(self) -> int:
        """What is free of the whole device, other processes' share taken off."""
        free_cache(self._device)
        return int(self._backend.mem_get_info(self._device)[0])


def measurable(device: str) -> DeviceMemory | None:
    """The memory of `device`; None for CPUs, and where the backend does not tell."""
    backend = _backend(device)
    return DeviceMemory(device, backend) if all(hasattr(backend, name) for name in _MEASURING) else None


def memory_bytes(device: str) -> tuple[int, int]:
    """(bytes this process uses, bytes there are) of `device`; for a CPU, of the host. 0 for what is not told.

    Asks the allocator's own books, not the device: that would wait for one that hangs.
    """
    backend = _backend(device)
    if backend is not None:
        used, total = getattr(backend, "memory_reserved", None), getattr(backend, "get_device_properties", None)
        return int(used(device)) if used else 0, int(getattr(total(device), "total_memory", 0)) if total else 0
    if device.partition(":")[0] != "cpu":
        return 0, 0
    with contextlib.suppress(OSError, ValueError, IndexError):  # only Linux has all of it
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        used_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return used_pages * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes
    return 0, 0


def _backend(device: str) -> Any:
    """torch.cuda for "cuda:0", and so on; None for a CPU, and before torch is loaded."""
    kind = device.partition(":")[0]
    return None if kind == "cpu" else getattr(sys.modules.get("torch"), kind, None)
