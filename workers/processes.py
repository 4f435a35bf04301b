"""Starts child processes that end with this one, and stops them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

#: What becomes the child, for it must be done in the child. Not in a `preexec_fn`: that runs Python code between fork and
#: exec, where a lock that another thread of ours held is held for ever, and with it the launcher. A process that starts
#: anew has no such locks. It takes the parent's process id, the cores and the command. Signals that Python ignores are
#: set as the kernel has them; 1 is PR_SET_PDEATHSIG of <linux/prctl.h>.
_BECOME = """
import os, signal, sys
parent, cores, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)
if cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, map(int, cores.split(",")))
for name in ("SIGPIPE", "SIGXFSZ"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
os.execv(command[0], command[1:])
"""


def spawn(
    command: Sequence[str], environment: Mapping[str, str] | None = None, cores: Sequence[int] = (), **popen: Any
) -> subprocess.Popen[bytes]:
    """Start `command` with `environment` added to ours, on `cores` alone if any are named.

    It has a session of its own, so that a Ctrl-C in the terminal does not reach it: we stop our children in an order
    that loses nothing. If we are killed, Linux sends it SIGTERM. Only the main thread may call it: for the kernel,
    the parent of a child is the thread that started it. FileNotFoundError if there is no such program.
    """
    program = shutil.which(command[0])
    if program is None:
        raise FileNotFoundError(2, "no such program", command[0])
    # Isolated, and without site-packages: it needs neither, and starts in some milliseconds.
    become = [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), ",".join(map(str, cores)), program]
    return subprocess.Popen(
        [*become, *command], env={**os.environ, **(environment or {})}, start_new_session=True, **popen
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
