"""SIGTERM with a deep backlog: a worker finishes what is in batches and gives the rest back, within its bound."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from embedq import tasks
from tests import bulk
from tests.events import TIMEOUT_S
from tests.running import Running

MODEL = "drained"

#: Its queue, as a list per priority.
QUEUES = [f"embed.{MODEL}{suffix}" for suffix in ("", ":3", ":6", ":9")]

#: What the worker may take from SIGTERM to its end.
BOUND_S = 10.0


@pytest.fixture
def worker(server: str, minilm: Path) -> Iterator[Running]:
    """A worker of the test's own, on a queue of its own."""
    environment = {
        "EMBEDQ_REDIS_URL": server,
        "EMBEDQ_MODELS": f"{MODEL}={minilm}",
        "EMBEDQ_DEFAULT_EMBED": "none",
        "EMBEDQ_DEFAULT_RERANK": "none",
        "EMBEDQ_DEVICE": "cpu",
        "EMBEDQ_DRAIN_TIMEOUT_S": str(BOUND_S),
    }
    with Running([sys.executable, "-m", "embedq.workers.worker"], environment) as running:
        running.wait_for("action=worker_ready")
        yield running
    tasks.embed.registry.forget(MODEL)
    with redis.Redis.from_url(server) as client:
        client.delete(*QUEUES)


def send(texts: list[str], priority: int) -> Any:
    return tasks.embed.apply_async((texts,), {"model": MODEL}, priority=priority)


def waiting(server: str) -> list[str]:
    """Ids of the jobs in the worker's queue, all priorities."""
    with redis.Redis.from_url(server) as client:
        held = [job for job in client.hvals("unacked") if QUEUES[0].encode() in job]  # other tests' jobs may wait there
        assert not held, f"{len(held)} jobs are still held by the worker"
        messages = [json.loads(message) for queue in QUEUES for message in client.lrange(queue, 0, -1)]
    return [message["headers"]["id"] for message in messages]


def drain(running: Running, num_signals: int = 1) -> None:
    """SIGTERM, and the end of the process: well, and within its bound."""
    for _ in range(num_signals):
        running.process.send_signal(signal.SIGTERM)
    try:
        assert running.wait(BOUND_S) == 0
    except subprocess.TimeoutExpired:
        running.process.kill()
        pytest.fail(f"the worker has not ended {BOUND_S:.0f} s after SIGTERM")
    assert "Traceback" not in running.output


def assert_each_is_answered_or_waits(jobs: list[Any], server: str) -> tuple[int, int]:
    """Every job has a result or is in the queue, none both; returns how many of each."""
    back = waiting(server)
    done = [job.id for job in jobs if job.state == "SUCCESS"]
    assert sorted([*done, *back]) == sorted(job.id for job in jobs)
    return len(done), len(back)


@pytest.mark.timing
def test_a_deep_backlog_of_small_jobs_is_given_back(worker: Running, server: str) -> None:
    texts = bulk.texts(1_500, seed=20)
    jobs = [send([text], priority=0 if index % 10 == 0 else 9) for index, text in enumerate(texts)]
    jobs[0].get(timeout=TIMEOUT_S)
    drain(worker)
    num_done, num_back = assert_each_is_answered_or_waits(jobs, server)
    assert num_done > 0
    assert num_back > num_done


@pytest.mark.timing
def test_many_signals_in_one_moment_end_a_worker_as_one_does(worker: Running, server: str) -> None:
    jobs = [send([text], priority=9) for text in bulk.texts(200, seed=22)]
    jobs[0].get(timeout=TIMEOUT_S)
    drain(worker, num_signals=50)
    assert_each_is_answered_or_waits(jobs, server)
    assert worker.output.count("action=draining") == 1


@pytest.mark.timing
def test_a_job_too_large_to_be_finished_is_given_back(worker: Running, server: str) -> None:
    small = send(["x"], priority=9)
    small.get(timeout=TIMEOUT_S)
    # Far more than any device computes within the bound.
    large = send(bulk.texts(tasks.config.wire["max_texts_per_job"], seed=21), priority=9)
    small_too = [send(["y"], priority=0) for _ in range(5)]
    for job in small_too:
        job.get(timeout=TIMEOUT_S)
    drain(worker)
    assert assert_each_is_answered_or_waits([small, large, *small_too], server) == (6, 1)


@pytest.mark.timing
def test_a_cold_shutdown_waits_for_nothing_and_loses_nothing(worker: Running, server: str) -> None:
    large = send(bulk.texts(10_000, seed=23), priority=9)
    small = send(["z"], priority=0)
    small.get(timeout=TIMEOUT_S)
    worker.process.send_signal(signal.SIGQUIT)
    worker.wait(BOUND_S / 2)
    assert assert_each_is_answered_or_waits([large, small], server) == (1, 1)
