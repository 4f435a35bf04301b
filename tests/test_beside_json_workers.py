"""Celery's own programs and another application's JSON workers beside ours, on one database."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from embedq import tasks
from embedq.workers.embedded import _free_port
from tests import json_application
from tests.events import TIMEOUT_S
from tests.running import Running
from tests.scraping import get

CELERY = [sys.executable, "-m", "celery"]

#: The session's worker.
OURS = f"minilm+reranker.cpu0@{socket.gethostname()}"


@pytest.fixture(scope="module")
def plain(worker: dict[str, str]) -> Iterator[Running]:
    """A stock worker whose jobs, results and commands are JSON; it mingles and gossips as by default."""
    command = [
        *CELERY,
        "-A",
        "tests.json_application",
        "worker",
        "-l",
        "INFO",
        "--pool",
        "solo",
        "-n",
        "json@%h",
    ]
    with Running(command, worker) as running:
        running.wait_for(" ready.")
        yield running
        assert running.stop() == 0
        assert "CRITICAL" not in running.output
        assert "ContentDisallowed" not in running.output


def said(command: list[str], worker: dict[str, str]) -> str:
    """The output of a program, which must end well."""
    with Running([*CELERY, *command], worker) as running:
        assert running.wait() == 0, running.output
        return running.output


def test_a_json_worker_mingles_with_ours_and_works(plain: Running, worker: dict[str, str]) -> None:
    assert "mingle: sync with 1 nodes" in plain.output
    assert json_application.split.delay("One. Two").get(timeout=TIMEOUT_S) == ["One", "Two"]
    assert len(tasks.embed.delay(["one"]).get(timeout=TIMEOUT_S)) == 1


@pytest.mark.parametrize("application", ["embedq.tasks", "tests.json_application"])
def test_status_and_inspect_reach_both_from_either_application(
    plain: Running, worker: dict[str, str], application: str
) -> None:
    both = {OURS, f"json@{socket.gethostname()}"}
    status = said(["-A", application, "status", "--timeout", "2"], worker)
    assert all(f"{name}: OK" in status for name in both)
    for what in ("ping", "active", "stats", "conf"):
        answered = json.loads(said(["-A", application, "inspect", what, "--timeout", "2", "--json"], worker))
        assert answered.keys() == both, what


def test_a_graph_of_the_workers_is_drawn(plain: Running, worker: dict[str, str]) -> None:
    assert "digraph" in said(["-A", "embedq.tasks", "graph", "workers"], worker)


def test_a_stock_flower_sees_both(plain: Running, worker: dict[str, str]) -> None:
    port = _free_port()
    command = [*CELERY, "-A", "tests.json_application", "flower", "--address=127.0.0.1", f"--port={port}"]
    environment = {**worker, "FLOWER_UNAUTHENTICATED_API": "true"}
    with Running(command, environment) as running:
        running.wait_for("Connected to")
        status, body = get(f"http://127.0.0.1:{port}/api/workers?refresh=true")
        assert status == 200, body
        assert json.loads(body).keys() == {OURS, f"json@{socket.gethostname()}"}
        assert "ContentDisallowed" not in running.output


def test_beat_sends_beside_ours(plain: Running, worker: dict[str, str], tmp_path: Any) -> None:
    command = ["-A", "tests.json_application", "beat", "-l", "INFO", "-s", str(tmp_path / "schedule")]
    with Running([*CELERY, *command], worker) as running:
        running.wait_for("Sending due task note")
        plain.wait_for("Task json.note[", count=2)  # received and succeeded: said before it is sent
        assert running.stop() == 0
