"""Keeps the embedded server running for as long as anybody uses it: the parent of the server's process.

    python -I embedded_keeper.py DIRECTORY PROGRAM ARGUMENT...      the server's configuration on standard input

    DIRECTORY/users      every user holds a shared lock on it
    DIRECTORY/server     locked by this process and the server: never do two servers write one directory
    DIRECTORY/url        removed when the server stops

The kernel releases a user's lock however the user ends. This process waits to have `users` for itself; then it stops the
server, and keeps the lock until the server has ended: whoever wants to use it then waits, and finds none. It is a program of
its own, without imports of ours, so that it is small.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

#: On SIGTERM the server writes out what is pending; a gigabyte takes seconds.
STOP_TIMEOUT_S = 30.0

#: What becomes the server, so that it ends with its parent. Not in a `preexec_fn`: see `processes`. It takes the parent's
#: process id and the command; 1 is PR_SET_PDEATHSIG of <linux/prctl.h>.
_BECOME = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
for name in ("SIGPIPE", "SIGXFSZ"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""


def main(directory: str, *command: str) -> int:
    """Run the server until nobody uses it, or it ends; returns its exit code."""
    held = os.open(Path(directory, "server"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_EX)
    process = subprocess.Popen(_ending_with_us(command), start_new_session=True, pass_fds=(held,))
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    threading.Thread(target=_stop_when_unused, args=(Path(directory), process), daemon=True).start()
    return process.wait()


def _ending_with_us(command: Sequence[str]) -> list[str]:
    """The command; on Linux one that becomes it, and gets SIGTERM when this process is killed."""
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _BECOME, str(os.getpid()), *command]


def _stop_when_unused(directory: Path, process: subprocess.Popen[bytes]) -> None:
    users = os.open(
        directory / "users", os.O_RDWR | os.O_CREAT, 0o600
    )  # until this process has ended, after the server
    fcntl.flock(users, fcntl.LOCK_EX)
    (directory / "url").unlink(missing_ok=True)
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
