"""A device's memory: recognises out-of-memory errors, measures free memory, and turns bytes into budgets of tokens.

Knows nothing of models or batches. Uses torch only if a model has loaded it already, and never imports it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import Any

#: Share of the free memory that a batch may take. The rest covers what the measured batch did not show: batches of
#: other shapes, the allocator's fragments, the driver.
USABLE_PART = 0.85

#: Running out of memory never lowers the budget below this many tokens. Another process may have filled the memory
#: for a second; without a limit the worker would compute texts one by one from then on.
MIN_BUDGET_TOKENS = 256

#: Messages of a failed allocation, in lower case: CUDA, Ascend, Moore Threads and Apple ("out of memory"), torch's CPU
#: allocator on Linux and elsewhere, the C++ library, cuBLAS and cuDNN.
_SAYINGS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory: you tried to allocate",
    "bad_alloc",
    "status_alloc_failed",
)

#: Functions of torch's device module that measuring needs.
_MEASURING = ("mem_get_info", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "empty_cache")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True if `error` is a failed allocation: by its class or, for devices without such a class, by its message."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)


def free_cache(device: str) -> None:
    """Release memory of `device` that torch caches and no tensor uses."""
    gc.collect()  # frames of a failed pass may hold each other, and its tensors
    empty_cache = getattr(_device_module(device), "empty_cache", None)
    if empty_cache is not None:
        # A device with a worse fault raises again at the next pass, where the error reaches a job.
        with contextlib.suppress(RuntimeError):
            empty_cache()


def reduced_budget(max_tokens: int, failed_tokens: int) -> int:
    """The budget after a batch of `failed_tokens`, padding included, ran out of memory: three quarters of them.

    At most `max_tokens`. A sequence longer than the new budget runs alone.
    """
    return min(max_tokens, max(MIN_BUDGET_TOKENS, failed_tokens * 3 // 4))


def fitting_budget(max_tokens: int, free_bytes: int, bytes_per_token: float) -> int:
    """The number of tokens that fit the usable share of `free_bytes`, at most `max_tokens`."""
    if bytes_per_token <= 0:
        return max_tokens
    return min(max_tokens, max(MIN_BUDGET_TOKENS, int(free_bytes * USABLE_PART / bytes_per_token)))


class DeviceMemory:
    """The memory of one accelerator, as torch's module for it (`torch.cuda`) reports it."""

    def __init__(self, device: str, device_module: Any) -> None:
        self._device = device
        self._device_module = device_module
        self._allocated_bytes = 0

    def start(self) -> None:
        """Start measuring."""
        self._device_module.reset_peak_memory_stats(self._device)
        self._allocated_bytes = int(self._device_module.memory_allocated(self._device))

    def taken_bytes(self) -> int:
        """Peak bytes of tensors since `start`, less those allocated before it."""
        return int(self._device_module.max_memory_allocated(self._device)) - self._allocated_bytes

    def free_bytes(self) -> int:
        """Bytes that are free on the device, all processes counted."""
        free_cache(self._device)
        return int(self._device_module.mem_get_info(self._device)[0])


def measurable(device: str) -> DeviceMemory | None:
    """The memory of `device`; None for CPUs and for devices whose torch module lacks the functions."""
    device_module = _device_module(device)
    return DeviceMemory(device, device_module) if all(hasattr(device_module, name) for name in _MEASURING) else None


def memory_bytes(device: str) -> tuple[int, int]:
    """(bytes this process uses, total bytes) of `device`; for a CPU, of the host. 0 for what is unknown.

    Reads the allocator's own counters: to ask a device that hangs would block.
    """
    device_module = _device_module(device)
    if device_module is not None:
        used, total = (
            getattr(device_module, "memory_reserved", None),
            getattr(device_module, "get_device_properties", None),
        )
        return int(used(device)) if used else 0, int(getattr(total(device), "total_memory", 0)) if total else 0
    if device.partition(":")[0] != "cpu":
        return 0, 0
    with contextlib.suppress(OSError, ValueError, IndexError):  # only Linux has all of it
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        used_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return used_pages * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes
    return 0, 0


def _device_module(device: str) -> Any:
    """torch.cuda for "cuda:0", and so on; None for a CPU, and before torch is loaded."""
    kind = device.partition(":")[0]
    return None if kind == "cpu" else getattr(sys.modules.get("torch"), kind, None)
