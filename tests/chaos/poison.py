"""Texts on which the model's native code dies: those jobs end as dead letters, and their neighbours are answered.

The neighbours are in flight in the same process and lose an attempt with it, some of them as often as a
deadly job. Redis cannot tell them apart; that is why the last attempt of each is made alone.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import redis
from celery.result import AsyncResult
from kombu.utils.uuid import uuid

from embedq import tasks
from tests.bench.report import Figure
from tests.chaos.fleet import Fleet
from tests.chaos.light_worker import DEADLY
from tests.chaos.load import Answers, wait_for_answers
from tests.chaos.storm import check_results
from tests.consuming import dead_letters
from tests.own_server import OwnServer

#: Jobs among them that die, and those that do not.
FULL, QUICK = (5, 500), (1, 60)

#: Seconds until all are answered: some leases for each deadly job.
_PATIENCE_S = 90.0


def run(num_jobs: tuple[int, int], seed: int, say: Callable[[str], None]) -> list[Figure]:
    """Send deadly jobs among others to two workers; returns what became of all of them."""
    num_deadly, num_neighbours = num_jobs
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embedq-chaos-")))
        server = stack.enter_context(OwnServer(directory, appendfsync="no"))
        tasks.app.conf.update(broker_url=server.url, result_backend=server.url)
        stack.callback(tasks.app.close)
        answers = Answers(server.url)
        stack.callback(answers.close)
        kinds = [True] * num_deadly + [False] * num_neighbours
        random.Random(seed).shuffle(kinds)
        jobs = [
            (_send(is_deadly), is_deadly) for is_deadly in kinds
        ]  # before there are workers: these take many at once
        fleet = stack.enter_context(Fleet(server.url, directory, 2, CHAOS_PASS_S="0.01"))
        missing = wait_for_answers(answers, [job.id for job, _ in jobs], _PATIENCE_S)
        fleet.stop()
        fleet.look()
        codes = Counter(fleet.ended.values())
        say(f"{codes[-11]} workers died of {num_deadly} jobs")
        deadly = [job for job, is_deadly in jobs if is_deadly]
        poisoned = [
            job for job in deadly if type(job.result).__name__ == "Poisoned" and "3 workers died" in str(job.result)
        ]
        with redis.Redis.from_url(server.url) as client:
            right = check_results(client, [job.id for job, is_deadly in jobs if not is_deadly])["SUCCESS"]
            letters = [letter for letter in dead_letters(client) if letter["reason"] == "poisoned"]
        return [
            Figure("deadly", "jobs that kill their worker (SIGSEGV)", num_deadly, "jobs"),
            Figure("poisoned", "  answered with Poisoned after three deaths", len(poisoned), "jobs", num_deadly),
            Figure("letters", "  poisoned dead letters in all", len(letters), "jobs", num_deadly, is_limit=True),
            Figure("deaths", "workers that died of them", codes[-11], "workers", 3 * num_deadly, is_limit=True),
            Figure("neighbours", "their neighbours", num_neighbours, "jobs"),
            Figure("neighbours_right", "  answered with the right vectors", right, "jobs", num_neighbours),
            Figure("poison_lost", "jobs without a result", len(missing), "jobs", 0, is_limit=True),
        ]


def _send(is_deadly: bool) -> AsyncResult:
    job_id = uuid()
    return tasks.embed.apply_async(([f"{DEADLY} {job_id}" if is_deadly else job_id],), task_id=job_id)
