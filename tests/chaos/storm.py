"""Every attack on workers under load, and what must hold afterwards: no job lost, each answered once.

What a producer may expect, and is counted here:

- A job counts as sent once its call returned. A call that raises OperationalError while the server is
  away may have sent its job or not; made again with the same id, it has one result either way.
- `max_attempts` is out of reach in this run. Kills at random hit whatever a worker happens to hold, and
  with the default of 3 some innocent jobs would be answered with `Poisoned`: all that Redis knows of
  them is that three workers died. That is an answer and not a loss, but it would hide losses here.
- The server runs with `appendfsync always`. What it confirms is then in the file when it is killed. With
  `everysec` it is in the kernel's hands before it is confirmed, which outlives the process, but for
  the moments when the disk is at an fsync: what is written meanwhile is confirmed first, and is lost.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis
from celery import states

from embedq import tasks
from tests.bench.report import Figure
from tests.chaos.attacks import RECOVERY_S, REDELIVERY_S, Attacks, redelivery_s
from tests.chaos.fleet import Fleet
from tests.chaos.load import Answers, Load, wait_for_answers
from tests.chaos.notes import Done, read
from tests.chaos.proxy import Proxy
from tests.checkpoints import expected_rows
from tests.consuming import dead_letters, in_flight
from tests.own_server import OwnServer

#: Seconds of one pass of four texts.
_PASS_S = 0.05

_NUM_WORKERS = 5

#: Seconds that all jobs may take to be answered once the attacks are over.
_LAST_ANSWERS_S = 60.0

#: Results fetched in one call.
_MAX_KEYS = 500


@dataclass(frozen=True)
class Size:
    """The number of times that each attack is made."""

    num_kills: int = 200
    num_hung: int = 10
    num_server_kills: int = 20
    num_cuts: int = 40
    num_freezes: int = 5
    num_frozen_for_good: int = 1


QUICK = Size(num_kills=12, num_hung=1, num_server_kills=2, num_cuts=4, num_freezes=1, num_frozen_for_good=0)


def run(size: Size, seed: int, say: Callable[[str], None], appendfsync: str = "always") -> list[Figure]:
    """Make all attacks one kind after another while jobs are sent; returns what was counted."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedq-chaos-")))
        server = stack.enter_context(OwnServer(directory, appendfsync=appendfsync))
        proxy = stack.enter_context(Proxy(server.port))
        tasks.app.conf.update(broker_url=server.url, result_backend=server.url)
        stack.callback(tasks.app.close)
        settings = {"EMBEDQ_MAX_ATTEMPTS": "1000", "CHAOS_PASS_S": str(_PASS_S), "CHAOS_PROXY_URL": proxy.url}
        fleet = stack.enter_context(Fleet(server.url, directory, _NUM_WORKERS, **settings))
        fleet.wait_until_serving(_NUM_WORKERS)
        answers = Answers(server.url)
        stack.callback(answers.close)
        attacks = Attacks(fleet, server, proxy, seed)
        with Load(answers) as load:
            _attack(
                attacks, size, lambda what: say(f"{what}; {len(load.sent):,} jobs sent, {load.num_outstanding} out")
            )
        say(f"the attacks are over; waiting for the last of {len(load.sent):,} jobs")
        lost = wait_for_answers(answers, load.sent, _LAST_ANSWERS_S)
        with redis.Redis.from_url(server.url) as client:
            _settle(client)
            states_of = check_results(client, load.sent)
            left = in_flight(client) + sum(client.llen(key) for key in client.scan_iter("embed*", _type="list"))
            dead = [(letter["reason"], letter["detail"], letter["deliveries"]) for letter in dead_letters(client)]
        if dead:
            say(f"dead letters: {dead}")
        fleet.stop()
        done = read(fleet.notes)
        by_themselves = {pid: code for pid, code in fleet.ended.items() if code not in (0, -9)}
        if by_themselves:
            say(f"exit codes by process id: {by_themselves}; the workers' last lines:\n{fleet.output[-200_000:]}")
        return [
            *_of_attacks(attacks, done),
            *_of_jobs(load, answers, done, states_of),
            Figure("lost", "jobs without a result", len(lost), "jobs", 0, is_limit=True),
            Figure("left", "jobs left in a queue or in flight", left, "jobs", 0, is_limit=True),
            Figure("dead", "dead letters", len(dead), "jobs", 0, is_limit=True),
            Figure("exits", "workers that ended by themselves", len(by_themselves), "workers", 0, is_limit=True),
        ]


def _attack(attacks: Attacks, size: Size, say: Callable[[str], None]) -> None:
    def on_kill() -> None:
        if attacks.num_killed % 20 == 0:
            say(f"{attacks.num_killed} workers killed")

    attacks.kill_workers(size.num_kills, on_kill)
    attacks.hang(size.num_hung)
    say(f"{attacks.num_hung} workers hung and came back")
    attacks.cut_connections(size.num_cuts)
    say(f"{attacks.num_cut} connections cut")
    attacks.freeze(size.num_freezes)
    say(f"{attacks.num_freezes} times connections frozen")
    attacks.freeze_for_good(size.num_frozen_for_good)
    say(f"{len(attacks.recovered_s)} times frozen for good")
    attacks.kill_server(size.num_server_kills)
    say(f"{attacks.num_server_kills} times the server killed")


def kept_promises(run: str, url: str, answers: Answers, ids: list[str]) -> list[Figure]:
    """Wait for the last answers to the jobs `ids`; returns the figures of a run that must be 0, named after it."""
    lost = wait_for_answers(answers, ids, _LAST_ANSWERS_S)
    with redis.Redis.from_url(url) as client:
        _settle(client)
        states_of = check_results(client, ids)
        left, num_dead = in_flight(client), len(dead_letters(client))
    not_right = sum(states_of.values()) - states_of[states.SUCCESS]
    return [
        Figure(f"{run}_lost", "jobs without a result", len(lost), "jobs", 0, is_limit=True),
        Figure(f"{run}_not_right", "jobs with a failure or a wrong result", not_right, "jobs", 0, is_limit=True),
        Figure(f"{run}_left", "jobs left in flight", left, "jobs", 0, is_limit=True),
        Figure(f"{run}_dead", "dead letters", num_dead, "jobs", 0, is_limit=True),
    ]


def _settle(client: redis.Redis) -> None:
    """Wait until what was answered is acknowledged as well; what is left then is counted."""
    deadline_s = time.monotonic() + _LAST_ANSWERS_S
    while client.hlen("unacked") and time.monotonic() < deadline_s:
        time.sleep(0.05)


def check_results(client: redis.Redis, ids: list[str]) -> Counter[str]:
    """Counts the jobs that ended in each state; a success with wrong vectors counts as "WRONG"."""
    found: Counter[str] = Counter()
    for begin in range(0, len(ids), _MAX_KEYS):
        part = ids[begin : begin + _MAX_KEYS]
        for job_id, blob in zip(part, client.mget([f"celery-task-meta-{one}" for one in part]), strict=True):
            found[_state(job_id, blob)] += 1
    return found


def _state(job_id: str, blob: Any) -> str:
    if blob is None:
        return "MISSING"
    meta = tasks.app.backend.decode(blob)
    if meta["status"] == states.SUCCESS and not np.array_equal(meta["result"].dense, expected_rows([job_id])):
        return "WRONG"
    return str(meta["status"])


def _of_attacks(attacks: Attacks, done: Done) -> list[Figure]:
    seconds, num_settled = redelivery_s(attacks.losses, done)
    return [
        Figure("killed", "workers killed (SIGKILL)", attacks.num_killed, "workers"),
        Figure("stopped_first", "  of these stopped first (SIGSTOP)", attacks.num_stopped_first, "workers"),
        Figure("hung", "workers hung and resumed", attacks.num_hung, "workers"),
        Figure("hung_max_s", "  until their jobs had left them: max", max(attacks.hung_s), "s", REDELIVERY_S, True),
        Figure("server_kills", "server killed (SIGKILL) and started again", attacks.num_server_kills, "times"),
        Figure("cut", "connections closed by CLIENT KILL", attacks.num_cut, "connections"),
        Figure("freezes", "a worker's connections frozen and thawed", attacks.num_freezes, "times"),
        Figure("frozen_for_good", "  and frozen for good", len(attacks.recovered_s), "times"),
        Figure(
            "recovered_max_s",
            "    until it took jobs again: max",
            max(attacks.recovered_s, default=None),
            "s",
            RECOVERY_S,
            True,
        ),
        Figure("redelivered", "jobs held by a worker as it was lost", len(seconds) + num_settled, "jobs"),
        Figure("settled", "  acknowledged by it in that moment", num_settled, "jobs"),
        Figure("redelivery_p50_s", "  elsewhere after: p50", statistics.median(seconds), "s"),
        Figure("redelivery_max_s", "  max", max(seconds), "s", REDELIVERY_S, is_limit=True),
    ]


def _of_jobs(load: Load, answers: Answers, done: Done, states_of: Counter[str]) -> list[Figure]:
    num_twice = sum(len(done.tags.get(job_id, ())) > 1 for job_id in load.sent)
    num_published_again = sum(count > 1 for count in answers.num_published.values())
    not_right = sum(states_of.values()) - states_of[states.SUCCESS]
    return [
        Figure("sent", "jobs sent", len(load.sent), "jobs"),
        Figure("raised", "calls that raised, and were repeated", len(load.raised), "calls"),
        Figure("sent_twice", "jobs that came into the queue more than once", num_twice, "jobs"),
        Figure("computed_again", "computations beyond one per job", done.num_repeated, "texts"),
        Figure("stored_again", "results stored more than once", num_published_again, "jobs", 0, is_limit=True),
        Figure("not_right", "jobs with a failure or a wrong result", not_right, "jobs", 0, is_limit=True),
    ]
