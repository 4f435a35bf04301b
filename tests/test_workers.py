"""Worker processes and their launcher: real processes, real signals."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from embedq import tasks
from embedq.tasks.models import Registry
from embedq.workers import logs
from embedq.workers.broker.server_check import with_server
from embedq.workers.exit_codes import EXIT_BROKEN, EXIT_CANNOT_START
from embedq.workers.processes import spawn, stop
from tests.events import Events
from tests.own_server import OwnServer
from tests.running import Running, children_of, is_alive, start_workers
from tests.test_transport import wait_until

TIMEOUT_S = 60


@pytest.fixture
def own(server: str, minilm: Path) -> Iterator[dict[str, str]]:
    """Environment for workers of a test's own: a model served under a name no other worker has."""
    yield {
        "EMBEDQ_REDIS_URL": server,
        "EMBEDQ_MODELS": f"own={minilm}",
        "EMBEDQ_DEFAULT_EMBED": "none",
        "EMBEDQ_DEFAULT_RERANK": "none",
        "EMBEDQ_LEASE_S": "2",
    }
    tasks.embed.registry.forget("own")
    with redis.Redis.from_url(server) as client:
        client.delete("embed.own")


def test_a_model_that_cannot_load_stops_the_launcher_before_any_job_is_taken(
    own: dict[str, str], tmp_path: Path
) -> None:
    tasks.app.send_task("tasks.embed", args=[["x"]], kwargs={"model": "own"})
    own |= {"EMBEDQ_MODELS": f"own={tmp_path}"}
    with Running([sys.executable, "-m", "embedq.workers", "--cpu-workers", "1"], own) as running:
        assert running.wait() == 1
    assert f"cannot start: {tmp_path} has no weights as safetensors" in running.output
    with redis.Redis.from_url(own["EMBEDQ_REDIS_URL"]) as client:
        assert client.llen("embed.own") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model is configured; give --model alias=path"),
        (["--model", "x"], "a model is written alias=path; given 'x'"),
        (["--model", "x=/", "--devices", "cuda:7"], "device 'cuda:7' is not on this machine; there is"),
        (["--model", "x=/", "--cpu-workers", "1000"], "1000 CPU workers were asked for; at most one per core"),
    ],
)
def test_a_wrong_command_line_ends_with_one_line_that_says_so(arguments: list[str], message: str) -> None:
    with Running(
        [sys.executable, "-m", "embedq.workers", *arguments], {"EMBEDQ_REDIS_URL": "redis://127.0.0.1:1/0"}
    ) as running:
        assert running.wait() == 1
    assert message in running.output
    assert "Traceback" not in running.output


def test_each_worker_is_born_pinned_and_named(own: dict[str, str]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    num_workers = min(2, len(cores))
    with start_workers(own, "--cpu-workers", str(num_workers)) as running:
        names = {f"own.cpu{index}@{socket.gethostname()}" for index in range(num_workers)}
        assert {
            name
            for answer in tasks.app.control.ping(timeout=5, destination=list(names), limit=num_workers)
            for name in answer
        } == names
        pinned = {}
        for pid in children_of(running.process.pid):
            environment = dict(
                part.split("=", 1) for part in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in part
            )
            assert environment["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(pid)))
            pinned[environment["EMBEDQ_DEVICE_LABEL"]] = os.sched_getaffinity(pid)
        assert len(pinned) == num_workers
        assert set.union(*pinned.values()) <= set(cores)
        assert sum(map(len, pinned.values())) == len(set.union(*pinned.values())), "two workers share a core"


def test_a_killed_worker_is_replaced_and_its_jobs_are_done(own: dict[str, str]) -> None:
    with start_workers(own, "--cpu-workers", "1") as running:
        jobs = [tasks.embed.delay([f"text {index} " * 60] * 10, model="own") for index in range(12)]
        jobs[0].get(timeout=TIMEOUT_S)
        (child,) = children_of(running.process.pid)
        os.kill(child, signal.SIGKILL)
        running.wait_for("action=worker_crashed")
        assert all(job.get(timeout=TIMEOUT_S).dense.shape == (10, 384) for job in jobs)
        running.wait_for("action=worker_ready", count=2)


def test_a_job_longer_than_its_lease_is_delivered_once(own: dict[str, str]) -> None:
    own["EMBEDQ_LEASE_S"] = "1"
    with start_workers(own, "--cpu-workers", "1") as running:
        job = tasks.embed.delay(["a text of some length, repeated " * 12] * 300, model="own")
        with redis.Redis.from_url(own["EMBEDQ_REDIS_URL"]) as client:
            assert job.get(timeout=TIMEOUT_S).dense.shape == (300, 384)
            assert client.llen("embed.own") == 0
        name = f"own.cpu0@{socket.gethostname()}"
        (stats,) = tasks.app.control.inspect(destination=[name], timeout=5).stats().values()
        assert stats["total"] == {"tasks.embed": 1}
        assert "redelivered" not in running.output


def test_a_worker_whose_pass_hangs_says_so_and_ends_and_its_job_is_done_elsewhere(own: dict[str, str]) -> None:
    # No pass is as fast as this limit: to this worker every batch hangs.
    with start_workers(own | {"EMBEDQ_HANG_TIMEOUT_S": "0.002"}, "--cpu-workers", "1") as running:
        job = tasks.embed.delay([f"the {number}th of many words" * 50 for number in range(64)], model="own")
        running.wait_for("action=worker_crashed")
    assert "no progress for longer than hang_timeout_s" in running.output
    assert "code=3" in running.output
    assert not job.ready()
    with start_workers(own, "--cpu-workers", "1"):
        assert len(job.get(timeout=TIMEOUT_S)) == 64


def test_killing_the_launcher_ends_its_workers(own: dict[str, str]) -> None:
    running = start_workers(own, "--cpu-workers", "1")
    (child,) = children_of(running.process.pid)
    running.process.kill()
    running.wait()  # the worker holds the same output pipe, and closes it at its end
    wait_until(lambda: not is_alive(child))
    assert "action=draining" in running.output


def test_events_show_counts_and_never_a_text(worker: dict[str, str]) -> None:
    secret = "a very private sentence"
    with Events() as events:
        ours = tasks.embed.delay([secret, "x"], dimensions=64)
        foreign = tasks.app.send_task("tasks.embed", args=[[secret, "x"]], queue="embed")
        wrong = tasks.app.send_task("tasks.embed", args=[[secret]], kwargs={"dtype": secret}, queue="embed")
        received, succeeded = (
            [events.wait_for(kind, job.id) for job in (ours, foreign)] for kind in ("received", "succeeded")
        )
        received.append(events.wait_for("received", wrong.id))
        events.wait_for("failed", wrong.id)
        assert secret not in str([events.of(job.id) for job in (ours, foreign)] + [events.of(wrong.id)[0]])
    assert [(event["args"], event["kwargs"]) for event in received] == [
        ("2 texts, 24 characters", "dimensions=64"),
        ("2 texts, 24 characters", "{}"),
        ("(not shown)", "(not shown)"),
    ]
    assert [event["result"] for event in succeeded] == ["2 × 64 float32", "2 × 384 float32"]


def test_a_child_ends_with_the_thread_of_its_parent_and_not_with_a_keyboard_interrupt() -> None:
    child = spawn(["sleep", "60"])
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    assert stop(child, timeout_s=10) == -signal.SIGTERM


def test_a_child_that_ignores_sigterm_is_killed() -> None:
    child = spawn(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 60; done"], stdout=-1)
    assert child.stdout
    assert child.stdout.readline() == b"ready\n"
    assert stop(child, timeout_s=0.2) == -signal.SIGKILL
    child.stdout.close()


def test_a_log_line_is_a_sentence_and_its_fields() -> None:
    record = logging.LogRecord("workers", logging.INFO, "", 0, "took %d jobs", (3,), None)
    record.action, record.device = "took", "cpu0"
    formatter = logs.FieldFormatter("%(levelname)s %(message)s")
    assert formatter.format(record) == "INFO took 3 jobs action=took device=cpu0"
    assert record.getMessage() == "took 3 jobs"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@host:1/0", "redis://***@host:1/0"),
        ("rediss://user:secret@host/0", "rediss://***@host/0"),
        ("redis://host:1/0", "redis://host:1/0"),
    ],
)
def test_logs_never_hold_a_password(url: str, shown: str) -> None:
    assert logs.without_password(url) == shown


def test_a_server_that_goes_away_while_a_worker_starts_is_waited_for(tmp_path: Path) -> None:
    with OwnServer(tmp_path) as server:
        tries: list[bool] = []

        def announce() -> None:
            if not tries:
                server.kill()
            tries.append(True)
            server.client.ping()

        starting = threading.Thread(target=with_server, args=(server.url, announce))
        starting.start()
        server._running.wait()
        server.start()
        starting.join(60)
        assert not starting.is_alive()
        assert len(tries) == 2


def test_an_error_nobody_expected_is_no_refusal_to_start(own: dict[str, str]) -> None:
    broken = "import sys; from embedq import core; from embedq.workers import worker; core.load_all = lambda settings: 1 / 0; sys.exit(worker.main())"
    with Running([sys.executable, "-c", broken], own) as running:
        assert running.wait() == EXIT_BROKEN
    assert "action=worker_broken" in running.output
    assert "ZeroDivisionError" in running.output
    assert "action=cannot_start" not in running.output
    assert EXIT_BROKEN != EXIT_CANNOT_START


def test_a_server_that_was_emptied_knows_the_models_again(minilm: Path, tmp_path: Path) -> None:
    with OwnServer(tmp_path) as server:
        environment = {"EMBEDQ_REDIS_URL": server.url, "EMBEDQ_MODELS": f"own={minilm}"}
        with start_workers(environment, "--cpu-workers", "1"):
            registry = Registry(server.client)
            assert registry.all().keys() == {"own"}
            server.client.flushall()
            wait_until(lambda: registry.all().keys() == {"own"})
