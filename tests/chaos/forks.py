"""Producers that fork, wait in parent and children at once, and lose their connections meanwhile.

`python -m tests.chaos.forks CHILDREN JOBS SEED` is such a producer, as gunicorn with `--preload` is one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import redis

from embedq import tasks
from tests.bench.report import Figure
from tests.chaos.fleet import Fleet
from tests.checkpoints import expected_rows
from tests.own_server import OwnServer
from tests.running import ROOT

#: Seconds that one wait may take: leases are 2 s, and connections are cut meanwhile.
_WAIT_S = 30.0

#: Seconds of a whole run.
_PATIENCE_S = 300.0


@dataclass(frozen=True)
class Size:
    """Processes that fork the producer, and jobs of each."""

    num_children: int
    num_jobs: int


QUICK, FULL = Size(4, 40), Size(16, 400)


def run(size: Size, seed: int, say: Callable[[str], None]) -> list[Figure]:
    """Run one forking producer and cut its connections at random; returns what was counted."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedq-chaos-")))
        server = stack.enter_context(OwnServer(directory, appendfsync="everysec"))
        fleet = stack.enter_context(Fleet(server.url, directory, 2, CHAOS_PASS_S="0.01"))
        fleet.wait_until_serving(2)
        command = [sys.executable, "-m", "tests.chaos.forks", *map(str, (size.num_children, size.num_jobs, seed))]
        environment = os.environ | {"EMBEDQ_REDIS_URL": server.url, "EMBEDQ_CONFIG": ""}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        num_cut = _cut(server.url, process, random.Random(seed))
        assert process.stdout
        answers = [json.loads(line) for line in process.stdout.read().splitlines()]
        process.wait()
        say(f"{len(answers)} processes have waited, {num_cut} connections were cut")
        total, wanted = size.num_jobs * (size.num_children + 1), size.num_children + 1
        right = sum(answer["right"] for answer in answers)
        return [
            Figure("children", "forks of a producer that has waited", size.num_children, "processes"),
            Figure("forks_cut", "connections cut meanwhile", num_cut, "connections"),
            Figure("right", "results that were right, in parent and forks", right, "jobs", total),
            Figure("stuck", "waits that failed or got another's result", total - right, "jobs", 0, is_limit=True),
            Figure("gone", "processes that ended otherwise", wanted - len(answers), "processes", 0, is_limit=True),
            Figure("slowest_s", "slowest wait", max(answer["slowest_s"] for answer in answers), "s", _WAIT_S, True),
        ]


def _cut(url: str, process: subprocess.Popen[bytes], random_: random.Random) -> int:
    """Have the server close subscriptions now and then until the producer has ended; returns how many."""
    num_cut, deadline_s = 0, time.monotonic() + _PATIENCE_S
    with redis.Redis.from_url(url) as client:
        while process.poll() is None and time.monotonic() < deadline_s:
            time.sleep(random_.uniform(0.5, 1.5))
            num_cut += client.client_kill_filter(_type="pubsub", skipme=True)
    if process.poll() is None:
        process.kill()
    return num_cut


def _wait(name: str, num_jobs: int) -> None:
    """Send jobs, wait for each in turn, and print how it was, in one write."""
    right, slowest_s = 0, 0.0
    for number in range(num_jobs):
        text, begun_s = f"{name}-{number}", time.monotonic()
        try:
            rows = tasks.embed.apply_async(([text],), task_id=text).get(timeout=_WAIT_S)
        except Exception as error:
            print(f"{text}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            right += rows.dense.tolist() == expected_rows([text]).tolist()
        slowest_s = max(slowest_s, time.monotonic() - begun_s)
    line = json.dumps({"name": name, "right": right, "slowest_s": slowest_s}) + "\n"
    os.write(1, line.encode())


def main(num_children: int, num_jobs: int, seed: int) -> None:
    """Wait once, fork, and wait in all processes at once."""
    tasks.embed.delay(["before"]).get(timeout=_WAIT_S)
    children = []
    for number in range(num_children):
        pid = os.fork()
        if pid == 0:
            _wait(f"child-{seed}-{number}", num_jobs)
            os._exit(0)
        children.append(pid)
    _wait(f"parent-{seed}", num_jobs)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
