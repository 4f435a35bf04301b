"""Allows one launcher per device: locks a file per device or core while the launcher or one of its workers lives.

The lock belongs to an open file that every worker on the device inherits. The kernel releases it with the last process
that has the file, however it ends: after `kill -9` of a launcher, its draining workers still keep the next launcher
from starting others beside them. It prevents mistakes of one user: launchers with another EMBEDQ_DATA_DIR, of another
user or in another container are not seen.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from embedq.core.devices import VISIBILITY, Device
from embedq.core.errors import OperatorError
from embedq.tasks import config

log = logging.getLogger(__name__)

#: Seconds between two attempts while the workers of a dead launcher drain; no event signals their end.
_POLL_S = 0.1


@contextlib.contextmanager
def locked(devices: Sequence[Device], drain_timeout_s: float) -> Iterator[dict[str, list[int]]]:
    """Lock `devices`; yields, by label, the file descriptors that the workers on each inherit.

    OperatorError names the process that holds one of them. If that launcher is dead, its workers are waited for, and
    killed if they have not drained in `drain_timeout_s`.
    """
    with contextlib.ExitStack() as stack:
        directory = config.data_dir() / "devices"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            log.warning(
                "devices cannot be locked: another launcher could use them, too",
                extra={"action": "devices_not_locked", "directory": str(directory), "reason": error.strerror},
            )
            yield {}
            return
        descriptors: dict[str, list[int]] = {}
        for device in devices:
            for name in file_names(device):
                descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                stack.callback(os.close, descriptor)
                _lock(device.label, directory / name, descriptor, drain_timeout_s)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                descriptors.setdefault(device.label, []).append(descriptor)
        yield descriptors


def file_names(device: Device) -> list[str]:
    """Names of `device` on this machine, the same in every process: of an accelerator, or of each core."""
    if device.cores:
        return [f"core{core}" for core in device.cores]
    variable = VISIBILITY[device.kind]
    visible = device.environment()[variable] if variable else str(device.index)
    return [f"{device.kind}{visible}".replace("/", "-")]  # a name given by the user, such as MIG-GPU-…/1/0


def _lock(label: str, path: Path, descriptor: int, drain_timeout_s: float) -> None:
    deadline_s = time.monotonic() + drain_timeout_s
    is_logged = False
    while not _try_lock(descriptor):
        launcher = int(os.pread(descriptor, 20, 0).decode().strip() or 0)
        if launcher and _is_there(launcher, path):
            raise OperatorError(
                f"device {label} belongs to the launcher with process id {launcher}; stop that one, or let it serve all "
                "models, or give each launcher devices of its own by --devices (cuda:1; of a CPU, cores: cpu:0-3)"
            )
        if not is_logged:
            is_logged = True
            log.warning(
                "the workers of a dead launcher still drain",
                extra={"action": "device_wait", "device": label, "pids": sorted(holders(path))},
            )
        if time.monotonic() > deadline_s:
            _kill_all(label, path)
        time.sleep(_POLL_S)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _kill_all(label: str, path: Path) -> None:
    pids = holders(path)
    if not pids:
        raise OperatorError(f"device {label} is locked through {path} by a process that is not visible here")
    for pid in pids:
        log.error(
            "a worker of a dead launcher has not drained and is killed",
            extra={"action": "orphan_killed", "device": label, "pid": pid},
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _is_there(pid: int, path: Path) -> bool:
    """Returns True if the process that wrote its id into the file lives and, where there is /proc, has the file open."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is another user's
        return True
    return pid in holders(path) if Path("/proc/self/fd").is_dir() else True


def holders(path: Path) -> set[int]:
    """Ids of the other processes that have the file open (Linux; empty elsewhere)."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if any(_is_same(entry, path) for entry in (process / "fd").iterdir()):
                found.add(int(process.name))
    return found - {os.getpid()}


def _is_same(entry: Path, path: Path) -> bool:
    with contextlib.suppress(OSError):  # closed meanwhile
        return entry.samefile(path)
    return False
