"""Starts child processes that end with this one, and stops them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

#: From <linux/prctl.h>: the signal a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1


def spawn(
    command: Sequence[str], environment: Mapping[str, str] | None = None, cores: Sequence[int] = (), **popen: Any
) -> subprocess.Popen[bytes]:
    """Start `command` with `environment` added to ours, on `cores` alone if any are named.

    It has a session of its own, so that a Ctrl-C in the terminal does not reach it: we stop our children in an order
    that loses nothing. If we are killed, Linux sends it SIGTERM. Only the main thread may call it: for the kernel,
    the parent of a child is the thread that started it.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = os.getpid()

    def in_child() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # we died before the line above took effect
                os._exit(1)
        if cores and hasattr(os, "sched_setaffinity"):  # macOS has no such thing
            os.sched_setaffinity(0, cores)

    return subprocess.Popen(
        command, env={**os.environ, **(environment or {})}, start_new_session=True, preexec_fn=in_child, **popen
    )


def stop(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Send SIGTERM, wait, and kill the process if it has not ended in `timeout_s`. Returns the exit code."""
    if process.poll() is None:
        process.terminate()
    return finish(process, timeout_s)


def finish(process: subprocess.Popen[bytes], timeout_s: float) -> int:
    """Wait for a process that ends, and kill it if it has not in `timeout_s`. Returns the exit code."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
