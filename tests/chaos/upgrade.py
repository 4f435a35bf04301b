"""A rolling upgrade under load: workers of the previous release are killed and drained while ours take over."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from embedq import tasks
from tests import previous
from tests.bench.report import Figure
from tests.chaos.fleet import LEASE_S, Fleet
from tests.chaos.load import Answers, Load
from tests.chaos.storm import kept_promises
from tests.own_server import OwnServer

_NUM_WORKERS = 3

#: Jobs sent before, while and after both releases serve.
QUICK, FULL = 150, 3_000

#: Seconds for so many jobs.
_PATIENCE_S = 120.0


def run(num_jobs: int, seed: int, say: Callable[[str], None]) -> list[Figure]:
    """Upgrade while jobs are sent; returns what was counted, nothing where the previous release's history is missing."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedq-chaos-")))
        sources = directory / "previous"
        sources.mkdir()
        if not previous.unpack(sources):
            say(f"commit {previous.COMMIT[:7]} of the previous release is not in this checkout")
            return []
        server = stack.enter_context(OwnServer(directory, appendfsync="everysec"))
        tasks.app.conf.update(broker_url=server.url, result_backend=server.url)
        stack.callback(tasks.app.close)
        settings = {"CHAOS_PASS_S": "0.02", "EMBEDQ_LEASE_S": str(LEASE_S)}
        old = stack.enter_context(
            previous.start_workers(sources, server.url, directory / "old", _NUM_WORKERS, **settings)
        )
        ready = old.wait_for("action=worker_ready", _NUM_WORKERS)
        answers = Answers(server.url)
        stack.callback(answers.close)
        with Load(answers) as load:
            by_old = _answered(answers, num_jobs)
            say(f"{by_old:,} jobs answered by the previous release")
            fleet = stack.enter_context(Fleet(server.url, directory, _NUM_WORKERS, CHAOS_PASS_S="0.02"))
            fleet.wait_until_serving(_NUM_WORKERS)
            by_both = _answered(answers, num_jobs) - by_old
            os.kill(int(ready[seed % _NUM_WORKERS].partition("pid=")[2].split()[0]), signal.SIGKILL)
            say("one of the previous release killed")
            by_both += _answered(answers, num_jobs) - by_old - by_both
            code = old.stop()
            say(f"the previous release drained, {load.num_outstanding} jobs out")
            by_ours = _answered(answers, num_jobs) - by_old - by_both
        return [
            Figure("by_old", "jobs answered by workers of the previous release", by_old, "jobs"),
            Figure("by_both", "  while both served, and one was killed", by_both, "jobs"),
            Figure("by_ours", "  after the others had drained", by_ours, "jobs"),
            Figure("drained", "exit code of the previous release", code, "", 0, is_limit=True),
            *kept_promises("upgrade", server.url, answers, load.sent),
        ]


def _answered(answers: Answers, more: int) -> int:
    """Wait for so many answers more; returns how many there are now."""
    wanted, deadline_s = len(answers.known) + more, time.monotonic() + _PATIENCE_S
    with answers.changed:
        while len(answers.known) < wanted and time.monotonic() < deadline_s:
            answers.changed.wait(1.0)
        return len(answers.known)
