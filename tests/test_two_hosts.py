"""Workers on other hosts need the server's URL and nothing else; a host that is cut off loses no job.

Two hosts in network namespaces, a real server on a third, light workers; leases are short.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgpack
import pytest
import redis
from celery import Celery

from embedq.workers.embedded import find_program
from tests.hosts import Network, reason_against
from tests.running import Running

_REASON = reason_against()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=_REASON or "")

#: Seconds after which a host that is silent loses its jobs.
LEASE_S = 3

#: Seconds of a job: long enough that some are always under way.
JOB_S = 0.3

#: Seconds for what follows within a lease or two on a busy machine.
TIMEOUT_S = 45.0


class Pool:
    """A server that only hosts of a network reach, workers on two of them, and a producer."""

    def __init__(self, network: Network, directory: Path, stack: ExitStack) -> None:
        socket = directory / "server.sock"
        options = {
            "port": 6379,
            "unixsocket": socket,
            "dir": directory,
            "appendonly": "yes",
            "save": "",
            "protected-mode": "no",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        server = stack.enter_context(Running(network.on_server(find_program(), *arguments)))
        server.wait_for("Ready to accept connections")
        self.client = stack.enter_context(redis.Redis(unix_socket_path=str(socket)))
        # This process is on no host of the network: it uses the server's file.
        self.app = Celery("producer", broker=f"redis+socket://{socket}", set_as_current=False)
        stack.callback(self.app.close)
        self.app.conf.update(task_ignore_result=False, task_default_queue="echo")
        self.workers = {name: stack.enter_context(self._worker(network, name)) for name in ("near", "far")}
        for worker in self.workers.values():
            worker.wait_for("echo is ready")

    def send(self, *numbers: int) -> dict[str, int]:
        """A job for each number; gives the numbers by job."""
        return {str(self.app.send_task("echo", (number, JOB_S)).id): number for number in numbers}

    def held_by(self, name: str) -> set[str]:
        """The jobs that a host's worker has taken and not acknowledged, as the server knows it."""
        owner = f"echo/{self.workers[name].process.pid}"
        found = set()
        for tag, lines in self.client.hgetall("embedq:jobs").items():
            message = self.client.hget("unacked", tag)
            if message and lines.decode().splitlines()[-1].split("\t")[3] == owner:
                found.add(str(json.loads(message)[0]["headers"]["id"]))
        return found

    def results(self, jobs: dict[str, int]) -> dict[str, Any]:
        """What is stored so far, by job."""
        blobs = self.client.mget([f"celery-task-meta-{job}" for job in jobs])
        return {job: msgpack.unpackb(blob)["result"] for job, blob in zip(jobs, blobs, strict=True) if blob}

    def num_in_flight(self) -> int:
        return int(self.client.zcard("unacked_index"))

    @staticmethod
    def _worker(network: Network, name: str) -> Running:
        environment = {"EMBEDQ_REDIS_URL": f"redis://{network.address(name)}:6379/0", "EMBEDQ_LEASE_S": str(LEASE_S)}
        return Running(network.on(name, sys.executable, "-m", "tests.echo_worker"), environment)


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Look again and again: what happens is on other hosts, and they cannot tell us."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.05)


@pytest.fixture
def network() -> Iterator[Network]:
    with Network("near", "far") as network:
        yield network


@pytest.fixture
def pool(network: Network, tmp_path: Path) -> Iterator[Pool]:
    with ExitStack() as stack:
        yield Pool(network, tmp_path, stack)


def test_a_host_that_is_cut_off_loses_no_job_and_comes_back(pool: Pool, network: Network) -> None:
    jobs = pool.send(*range(60))
    wait_until(lambda: len(pool.held_by("far")) >= 4 and pool.results(jobs), "both hosts work")
    network.cut("far")
    lost_sight_of = pool.held_by("far")
    assert lost_sight_of
    # All are done while it is away, its own ones on the other host.
    wait_until(lambda: pool.results(jobs) == jobs, "every job has its result")
    assert lost_sight_of <= pool.results(jobs).keys()
    wait_until(lambda: not pool.num_in_flight(), "nothing is in flight")
    runs = {job.decode(): int(number) for job, number in pool.client.hgetall("runs").items()}
    assert runs.keys() == jobs.keys()

    network.mend("far")
    more = pool.send(*range(100, 160))
    wait_until(lambda: pool.held_by("far"), "the host takes jobs again")
    wait_until(lambda: pool.results(more) == more, "every job has its result")
    # What the host had finished while it was away came too late and changed nothing.
    assert pool.results(jobs) == jobs
    wait_until(lambda: not pool.num_in_flight(), "nothing is in flight")
    assert pool.client.xlen("embedq:dead") == 0
    assert all(worker.process.poll() is None for worker in pool.workers.values())


def test_a_host_that_stays_away_is_not_needed(pool: Pool, network: Network) -> None:
    """Its worker neither ends nor holds anything up, and nothing of the network is left behind in the end."""
    network.cut("far")
    jobs = pool.send(*range(30))
    wait_until(lambda: pool.results(jobs) == jobs, "every job has its result")
    assert pool.workers["far"].process.poll() is None
    pool.workers["far"].process.kill()  # a drain would wait for the server


def test_the_hosts_are_apart(network: Network) -> None:
    """The namespaces are what they are taken for: no way out, and none to each other."""
    for name, address in (("near", network.address("far")), ("far", network.address("near")), ("near", "127.0.0.1")):
        attempt = f"import socket; socket.create_connection(('{address}', 6379), 2)"
        with Running(network.on(name, sys.executable, "-c", attempt)) as running:
            assert running.wait() == 1
            assert "Error" in running.output
    assert os.getpid()
