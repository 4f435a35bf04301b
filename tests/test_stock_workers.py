"""Every way to start a Celery worker beside a running pool: it is an embedq worker, or it ends; and no job fails."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from embedq import tasks
from embedq.tasks.stock_workers import is_ours
from tests import stock_applications
from tests.running import Running, is_alive, require
from tests.scraping import wait_until

TIMEOUT_S = 60.0

#: Jobs that wait at once, so that a worker which should take none finds some.
JOBS_PER_ROUND = 16

PYTHON = sys.executable
CELERY = [PYTHON, "-m", "celery"]
OURS = [*CELERY, "-A", "embedq.tasks", "worker"]
COMMAND = "Start workers with `embedq workers --model alias=path`"


class Load:
    """Keeps jobs waiting in all four kinds of queues, and counts what became of them."""

    def __init__(self) -> None:
        self.num_rounds, self.failures = 0, list[str]()
        self._changed, self._is_over = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def last_rounds(self, num_rounds: int = 2) -> None:
        """Wait until so many more rounds were sent and answered, each job by a result."""
        with self._changed:
            wanted = self.num_rounds + num_rounds
            assert self._changed.wait_for(lambda: self.num_rounds >= wanted or self.failures, TIMEOUT_S), "jobs wait"
        assert self.failures == []

    def _run(self) -> None:
        while not self._is_over.is_set():
            failures = _one_round()
            with self._changed:
                self.num_rounds += 1
                self.failures += failures
                self._changed.notify_all()


def _one_round() -> list[str]:
    texts = [[f"text {number}", "another"] for number in range(JOBS_PER_ROUND // 4)]
    calls: list[tuple[str, list[str]]] = [("a question", part) for part in texts]
    jobs = tasks.embed_many(texts) + tasks.embed_many(texts, {"priority": 3}, model="minilm")
    jobs += tasks.rerank_many(calls) + tasks.rerank_many(calls, model="reranker")
    failures = []
    for job in jobs:
        try:
            job.get(timeout=TIMEOUT_S)
        except Exception as error:
            failures.append(repr(error))
    return failures


@pytest.fixture(scope="module")
def load(worker: dict[str, str]) -> Iterator[Load]:
    """Jobs for the session's worker, the running pool beside which the tests start others."""
    with Load() as load:
        load.last_rounds(1)
        yield load


def in_program(statement: str) -> list[str]:
    return [PYTHON, "-c", f"from embedq import tasks; from tests import stock_applications; {statement}"]


def of_application(name: str, *options: str) -> list[str]:
    pool = [] if "--pool" in options else ["--pool", "solo"]
    return [*CELERY, "-A", f"tests.stock_applications:{name}", "worker", "-l", "INFO", *pool, *options]


#: Starts that end up as an embedq worker, and what they print besides.
BECOMING = {
    "command line": ([*OURS, "-n", "named@%h", "-l", "INFO", "-E", "-c", "2"], "-c has no effect on an embedq worker"),
    "tasks of the checkout": ([*CELERY, "-A", "tasks", "worker", "-Q", "embed"], "-Q has no effect"),
    "worker_main": (in_program("tasks.app.worker_main(['worker', '-P', 'prefork'])"), ""),
    "Worker": (in_program("tasks.app.Worker(loglevel='INFO').start()"), ""),
}


@pytest.mark.parametrize(("command", "line"), BECOMING.values(), ids=BECOMING)
def test_a_stock_start_is_an_embedq_worker(command: list[str], line: str, load: Load, worker: dict[str, str]) -> None:
    with Running(command, worker) as running:
        ready = running.wait_for("action=worker_ready")[0]
        assert has_engine(name_in(ready))
        load.last_rounds()
        assert running.stop() == 0
    assert line in running.output
    assert ("named@%h" in command) == (f"worker=named@{socket.gethostname()} " in ready)
    load.last_rounds()


def test_celery_multi_starts_and_stops_embedq_workers(load: Load, worker: dict[str, str], tmp_path: Path) -> None:
    pid, log = tmp_path / "one.pid", tmp_path / "one.log"
    files = [f"--pidfile={tmp_path}/%n.pid", f"--logfile={tmp_path}/%n%I.log"]
    run([*CELERY, "multi", "start", "one", "-A", "embedq.tasks", *files], worker)
    try:
        wait_until(lambda: log.is_file() and "action=worker_ready" in log.read_text())
        number = int(pid.read_text())
        assert has_engine(name_in(next(line for line in log.read_text().splitlines() if "worker_ready" in line)))
        load.last_rounds()
    finally:
        run([*CELERY, "multi", "stopwait", "one", "-A", "embedq.tasks", *files], worker)
    assert not is_alive(number)
    load.last_rounds()


def test_celery_multi_writes_why_no_worker_starts(load: Load, worker: dict[str, str], tmp_path: Path) -> None:
    files = [f"--pidfile={tmp_path}/%n.pid", f"--logfile={tmp_path}/%n%I.log"]
    run([*CELERY, "multi", "start", "one", "-A", "embedq.tasks", "-P", "solo", *files], worker)
    log = tmp_path / "one.log"
    wait_until(lambda: log.is_file() and COMMAND in log.read_text())
    assert len(log.read_text().splitlines()) == 1
    assert not (tmp_path / "one.pid").exists()
    load.last_rounds()


#: Starts that end with code 1, and why.
ENDING = {
    "-P solo": ([*OURS, "-P", "solo"], "-P cannot be kept to"),
    "-P threads": ([*OURS, "-P", "threads"], "-P cannot be kept to"),
    "-P gevent": ([*OURS, "-P", "gevent"], "gevent has replaced them"),
    "-P eventlet": ([*OURS, "-P", "eventlet"], "eventlet has replaced them"),
    "-Q of others": ([*OURS, "-Q", "embed,mine"], "-Q names 'mine'"),
    "--autoscale": ([*OURS, "--autoscale=3,1"], "--autoscale cannot be kept to"),
    "--purge": ([*OURS, "--purge"], "--purge cannot be kept to"),
    "-B": ([*OURS, "-B"], "-B cannot be kept to"),
    "worker_main": (in_program("tasks.app.worker_main(['worker', '-P', 'solo'])"), "-P cannot be kept to"),
    "Worker": (in_program("tasks.app.Worker(pool='threads', concurrency=2).start()"), "-P cannot be kept to"),
    "WorkController": (in_program("tasks.app.WorkController(pool='solo').start()"), "embedq's queue 'embed'"),
    "application, -Q": (of_application("plain", "-Q", "stock,embed.minilm"), "embedq's queue 'embed.minilm'"),
    "application, -Q of a priority": (of_application("plain", "-Q", "embed:3"), "embedq's queue 'embed:3'"),
    "application, prefork": (of_application("plain", "-Q", "rerank", "--pool", "prefork"), "embedq's queue 'rerank'"),
    "application, gevent": (of_application("plain", "-Q", "embed", "--pool", "gevent"), "embedq's queue 'embed'"),
    "application, default queue": (of_application("by_default_queue"), "embedq's queue 'embed'"),
    "application, task_queues": (of_application("by_task_queues"), "embedq's queue 'rerank.reranker'"),
    "application, Worker": (
        in_program("stock_applications.plain.Worker(pool='solo', queues='embed').start()"),
        "embedq's queue 'embed'",
    ),
}


@pytest.mark.parametrize(("command", "reason"), ENDING.values(), ids=ENDING)
def test_a_stock_start_ends_with_the_command_to_use(
    command: list[str], reason: str, load: Load, worker: dict[str, str]
) -> None:
    for pool in {"gevent", "eventlet"}.intersection(command):
        require(importlib.util.find_spec(pool) is not None, f"{pool} is not installed")
    with Running(command, worker) as running:
        assert running.wait() == 1, running.output
    said = [line for line in running.lines if line.startswith("no worker is started")]
    assert len(said) == 1, running.output
    assert reason in said[0]
    assert said[0].endswith(COMMAND)
    # eventlet itself prints one about locks that it found, before anything of ours is imported.
    said_by_us = "\n".join(running.lines[running.lines.index(said[0]) :]) if "eventlet" in command else running.output
    assert "Traceback" not in said_by_us
    load.last_rounds()


def test_no_worker_starts_without_a_model(load: Load, worker: dict[str, str]) -> None:
    with Running(OURS, worker | {"EMBEDQ_CONFIG": ""}) as running:
        assert running.wait() == 1
    assert running.lines[-1].startswith("no worker is started: no model is configured")
    load.last_rounds()


def test_no_worker_starts_with_a_producers_packages(load: Load, worker: dict[str, str]) -> None:
    python = Path(sys.prefix) / "producer" / "bin" / "python"
    require(python.is_file(), "the producer's environment is not there: make test builds it")
    with Running([str(python), "-m", "celery", "-A", "embedq.tasks", "worker"], worker) as running:
        assert running.wait() == 1
    assert running.lines[-1].startswith("no worker is started: a worker needs the extra embedq[worker]")
    load.last_rounds()


def test_an_application_that_imports_us_works_on_its_own_queue_and_cannot_be_turned_to_ours(
    load: Load, worker: dict[str, str]
) -> None:
    app, name = application("plain"), f"plain@{socket.gethostname()}"
    with Running(of_application("plain", "-n", "plain@%h"), worker) as running:
        running.wait_for(" ready.")
        assert "is a queue of embedq" in asked(name, "add_consumer", app, queue="embed")["error"]
        assert asked(name, "add_consumer", app, queue="more") == {"ok": "add consumer more"}
        load.last_rounds()
        assert added(app, stock_applications.QUEUE) == added(app, "more") == 3
        assert queues_of(name, app) == {stock_applications.QUEUE, "more"}
        assert running.stop() == 0


def test_a_worker_whose_own_code_turns_it_to_our_queue_leaves_it_alone(load: Load, worker: dict[str, str]) -> None:
    app, name = application("late"), f"late@{socket.gethostname()}"
    with Running(of_application("late", "-n", "late@%h"), worker) as running:
        running.wait_for("leaves embedq's queue alone: embed")
        running.wait_for(" ready.")
        load.last_rounds()
        assert queues_of(name, app) == {stock_applications.QUEUE}
        assert added(app, stock_applications.QUEUE) == 3
        assert running.stop() == 0


def test_a_queue_of_another_database_may_have_our_name(load: Load, worker: dict[str, str]) -> None:
    with Running(of_application("elsewhere"), worker) as running:
        running.wait_for(" ready.")
        assert added(application("elsewhere", "7"), "embed") == 3
        assert running.stop() == 0
    load.last_rounds()


@pytest.mark.parametrize("queue", ["embed", "rerank", "embed.minilm", "rerank.a.b", "embed:3", "embed.minilm:6"])
def test_a_queue_is_ours(queue: str) -> None:
    assert is_ours(queue)


@pytest.mark.parametrize("queue", ["embedding", "reranker", "mine.embed", "", "EMBED", "celery", "embed-3"])
def test_a_queue_is_not_ours(queue: str) -> None:
    assert not is_ours(queue)


def run(command: list[str], environment: dict[str, str]) -> None:
    """Run a command to its end, which must be a good one."""
    with Running(command, environment) as running:
        assert running.wait() == 0, running.output


def name_in(ready: str) -> str:
    return ready.partition("worker=")[2].split()[0]


def asked(worker: str, command: str, app: Celery = tasks.app, **arguments: str) -> Any:
    """The answer of a worker of `app` to a command of remote control."""
    options = {"destination": [worker], "reply": True, "timeout": TIMEOUT_S, "limit": 1}
    (answer,) = app.control.broadcast(command, arguments, **options)
    return answer[worker]


def has_engine(worker: str) -> bool:
    """Returns True if a worker's pool computes: stock pools have no such statistics."""
    return "max_batch_tokens" in asked(worker, "embedq_stats")


def queues_of(worker: str, app: Celery) -> set[str]:
    """The queues a worker consumes from."""
    return {queue["name"] for queue in asked(worker, "active_queues", app)}


def application(name: str, number: str = "0") -> Celery:
    """One of the applications, in this process, on the database of that number."""
    app: Celery = getattr(stock_applications, name)
    url = f"{tasks.app.conf.broker_url.rpartition('/')[0]}/{number}"
    app.conf.update(broker_url=url, result_backend=tasks.app.conf.result_backend)
    return app


def added(app: Celery, queue: str) -> int:
    """The answer to a job of an application's own."""
    return int(app.send_task("stock.add", args=[1, 2], queue=queue).get(timeout=TIMEOUT_S))
