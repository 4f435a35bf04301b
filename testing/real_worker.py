"""A server and a worker of a test's own: processes as in production, ended with the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from embedq import tasks
from embedq.core.errors import OperatorError
from embedq.testing.models import served

#: Seconds between two looks into the log: a process has no other way to tell us, and this is not noticed.
_POLL_S = 0.05

#: Seconds from SIGTERM until what is left is killed.
_STOP_TIMEOUT_S = 30.0

#: Lines of the log that an error shows.
_TAIL_LINES = 15


@dataclass(frozen=True)
class Worker:
    """The worker that runs."""

    #: URL of its server.
    url: str
    #: Its log, there while it runs.
    log: Path


@contextmanager
def worker(
    models: Mapping[str, str] | None = None,
    *,
    url: str | None = None,
    options: Sequence[str] = ("--cpu-workers", "1"),
    settings: Mapping[str, str] | None = None,
    timeout_s: float = 180.0,
) -> Iterator[Worker]:
    """Run `embedq workers` with `options`, and send this process's jobs to them; afterwards all is as before.

    `models` are directories by alias, by default `minilm`, all-MiniLM-L6-v2. The server is one of its own, started and ended
    here, unless `url` names one that runs. Variables EMBEDQ_… and REDIS_URL, and a settings file, do not count, so that a test
    never reaches the server of a shell; `settings` are variables of the workers, `{"EMBEDQ_LEASE_S": "5"}`. Processes that a
    test starts meanwhile find the server by EMBEDQ_REDIS_URL.

    Needs the extras `worker` and `server`. OperatorError with the end of the log if it is not ready within `timeout_s`. For
    the main thread.
    """
    from embedq.workers.processes import spawn, stop

    with TemporaryDirectory(prefix="embedq-testing-") as folder, _environment(folder, models, url, settings or {}):
        log = Path(folder, "worker.log")
        with log.open("wb") as output:
            command = [sys.executable, "-m", "embedq", "workers", *options]
            process = spawn(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, log, timeout_s)
            with _sending_to(folder, url) as found:
                yield Worker(found, log)
        finally:
            stop(process, _STOP_TIMEOUT_S)


@contextmanager
def _environment(
    folder: str, models: Mapping[str, str] | None, url: str | None, settings: Mapping[str, str]
) -> Iterator[None]:
    """Replace this process's variables of embedq by those of the test, for the workers and whatever the test starts."""
    named = [name for name in os.environ if name.startswith("EMBEDQ_") or name == "REDIS_URL"]
    before = {name: os.environ.pop(name) for name in named}
    given = {"EMBEDQ_DATA_DIR": folder, "EMBEDQ_MODELS": json.dumps(served(models)["models"])}
    os.environ.update(given | ({"EMBEDQ_REDIS_URL": url} if url else {}) | dict(settings))
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("EMBEDQ_")]:
            del os.environ[name]
        os.environ.update(before)


def _wait_until_ready(process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        lines = log.read_text(errors="replace").splitlines()
        wanted = [line for line in lines if "action=launching" in line]
        num_workers = int(wanted[0].partition("num_workers=")[2].split()[0]) if wanted else 1
        if sum("action=worker_ready" in line for line in lines) >= num_workers:
            return
        if process.poll() is not None or time.monotonic() > deadline_s:
            why = "ended" if process.poll() is not None else f"is not ready after {timeout_s:.0f} s"
            raise OperatorError("\n".join([f"the worker of the test {why}; its log ends with:", *lines[-_TAIL_LINES:]]))
        time.sleep(_POLL_S)


@contextmanager
def _sending_to(folder: str, url: str | None) -> Iterator[str]:
    """Send this process's jobs to the server at `url`, or to the embedded one in `folder`; yields its URL."""
    app, wire = tasks.app, tasks.config.wire
    before, is_eager, of_wire = app.conf.broker_url, app.conf.task_always_eager, dict(wire)
    wire.update(data_dir=folder, redis_url=url or "")
    found = url or tasks.config.redis_url()
    wire["redis_url"] = os.environ["EMBEDQ_REDIS_URL"] = found
    app.conf.task_always_eager = False
    app.move_to(found)
    try:
        yield found
    finally:
        app.pool.force_close_all()
        app.backend.client.close()
        wire.update(of_wire)
        app.move_to(before)
        app.conf.task_always_eager = is_eager
