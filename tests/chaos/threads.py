"""Threads of workers that end one by one under load: each is restarted or ends its process, and no job is lost."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from embedq import tasks
from embedq.workers.exit_codes import EXIT_BROKEN, EXIT_DEVICE_DEAD
from tests.bench.report import Figure
from tests.chaos.fleet import Fleet
from tests.chaos.load import Answers, Load
from tests.chaos.storm import kept_promises
from tests.own_server import OwnServer

#: Threads without which no job is answered: their end is the process's. And those that are restarted.
FATAL = ("answers", "completion", "device")
RESTARTED = ("encode-0", "lease renewal", "heartbeat")

_NUM_WORKERS = 3

#: Seconds until a thread that is to end has ended: it does so as it next runs.
_PATIENCE_S = 30.0

#: How often each thread is ended.
QUICK, FULL = 1, 10


def run(times: int, seed: int, say: Callable[[str], None]) -> list[Figure]:
    """End every thread `times` times while jobs are sent; returns what was counted."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedq-chaos-")))
        server = stack.enter_context(OwnServer(directory, appendfsync="everysec"))
        tasks.app.conf.update(broker_url=server.url, result_backend=server.url)
        stack.callback(tasks.app.close)
        settings = {"EMBEDQ_MAX_ATTEMPTS": "1000", "CHAOS_PASS_S": "0.02"}
        fleet = stack.enter_context(Fleet(server.url, directory, _NUM_WORKERS, **settings))
        fleet.wait_until_serving(_NUM_WORKERS)
        answers = Answers(server.url)
        stack.callback(answers.close)
        order = [*FATAL, *RESTARTED] * times
        random.Random(seed).shuffle(order)
        unnoticed = []
        with Load(answers) as load:
            for name in order:
                if not _end(fleet, directory, name, random.Random(seed)):
                    unnoticed.append(name)
                say(f"{name} ended; {len(load.sent):,} jobs sent, {load.num_outstanding} out")
        promises = kept_promises("threads", server.url, answers, load.sent)
        fleet.stop()
        fleet.look()
        codes = [code for code in fleet.ended.values() if code in (EXIT_BROKEN, EXIT_DEVICE_DEAD)]
        if unnoticed:
            say(f"unnoticed: {unnoticed}; the workers' last lines:\n{fleet.output[-20_000:]}")
        return [
            Figure("threads_sent", "jobs sent while threads ended", len(load.sent), "jobs"),
            Figure("ended", "threads ended", len(order), "threads"),
            Figure("died", "  with their process", len(codes), "threads"),
            Figure("restarted", "  and restarted", fleet.output.count("action=thread_restarted"), "threads"),
            Figure("unnoticed", "  and not noticed", len(unnoticed), "threads", 0, is_limit=True),
            *promises,
        ]


def _end(fleet: Fleet, directory: Path, name: str, random_: random.Random) -> bool:
    """End one thread of a worker; returns True if its process ended, or the thread was restarted, in time."""
    pid = random_.choice(fleet.wait_until_serving(_NUM_WORKERS))
    before = fleet.output.count("action=thread_restarted")
    (directory / f"end-{pid}").write_text(name)
    fleet.send_signal(pid, signal.SIGUSR2)
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s:
        fleet.look()
        if pid in fleet.ended if name in FATAL else fleet.output.count("action=thread_restarted") > before:
            return True
        time.sleep(0.05)
    return False
