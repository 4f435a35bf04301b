"""Threads of workers that end one by one under load: each is restarted or ends its process, and no job is lost."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import redis
from celery import states

from embedq import tasks
from embedq.workers.exit_codes import EXIT_BROKEN, EXIT_DEVICE_DEAD
from tests.bench.report import Figure
from tests.chaos.fleet import Fleet
from tests.chaos.load import Answers, Load, wait_for_answers
from tests.chaos.storm import _settle, check_results
from tests.consuming import dead_letters, in_flight
from tests.own_server import OwnServer

#: Threads without which no job is answered: their end is the process's. And those that are restarted.
FATAL = ("answers", "completion", "device")
RESTARTED = ("encode-0", "lease renewal", "heartbeat")

_NUM_WORKERS = 3

#: Seconds that a thread has to notice, which ends as it next runs; and that all jobs may take afterwards.
_PATIENCE_S, _LAST_ANSWERS_S = 30.0, 60.0

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
        lost = wait_for_answers(answers, load.sent, _LAST_ANSWERS_S)
        with redis.Redis.from_url(server.url) as client:
            _settle(client)
            states_of = check_results(client, load.sent)
            left, num_dead = in_flight(client), len(dead_letters(client))
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
            Figure("threads_lost", "jobs without a result", len(lost), "jobs", 0, is_limit=True),
            Figure("threads_not_right", "jobs with a failure or a wrong result",
                   sum(states_of.values()) - states_of[states.SUCCESS], "jobs", 0, is_limit=True),
            Figure("threads_left", "jobs left in flight", left, "jobs", 0, is_limit=True),
            Figure("threads_dead", "dead letters", num_dead, "jobs", 0, is_limit=True),
        ]  # fmt: skip


def _end(fleet: Fleet, directory: Path, name: str, random_: random.Random) -> bool:
    """End one thread of a worker; whether its process ended, or the thread was restarted, in time."""
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
