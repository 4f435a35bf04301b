"""What a pool counts of its jobs: how large they are by queue, and for how long there were any."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import Retry
from celery.signals import task_revoked

from embedq import tasks
from embedq.workers.monitoring.job_counters import (
    UNKNOWN,
    Counts,
    JobCounts,
    Times,
    kind_of,
    outcome_of,
    times_of,
)
from tests.checkpoints import FakeModel
from tests.loops import job_of


def test_the_size_of_a_job_is_learned_per_queue_and_lately() -> None:
    counts = Counts()
    for _ in range(1000):
        counts.answered("embed.m", 10)
    for _ in range(1000):
        counts.answered("embed.m", 1000)
    counts.answered("rerank.m", 7)
    counts.answered("embed.refused", 0)  # failed before it was encoded: says nothing of sizes
    assert counts.tokens_per_job() == {"embed.m": pytest.approx(1000, rel=0.01), "rerank.m": 7}
    assert counts.num_jobs == 2002
    for index in range(1000):
        counts.answered(f"made-up-{index}", 1)
    assert len(counts.tokens_per_job()) == 200


def test_time_counts_as_busy_while_anything_is_held() -> None:
    counts = Counts()
    assert counts.busy_s == 0
    counts.holds(True)
    first_s = counts.busy_s
    counts.holds(True)
    assert counts.busy_s >= first_s
    counts.holds(False)
    rested_s = counts.busy_s
    counts.holds(False)
    assert counts.busy_s == rested_s > 0


def test_jobs_that_end_on_two_threads_are_all_counted() -> None:
    counts, num_each = JobCounts(["m"]), 20_000

    def revoke() -> None:
        for _ in range(num_each):
            counts._revoked(None)

    def answer() -> None:
        for _ in range(num_each):
            counts.count(UNKNOWN, "other", "revoked")

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-7)
    try:
        threads = [threading.Thread(target=work) for work in (revoke, answer, answer)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert counts.num_ended == counts.outcomes[UNKNOWN, "other", "revoked"] == 3 * num_each


TIMES = Times("fake", "embed", 0.02, 0.004, 0.3, 1.0, 12)


def test_each_outcome_is_counted_once_from_zero_and_only_computed_jobs_have_times() -> None:
    counts, done = JobCounts(["fake"]), list[str]()
    assert set(counts.outcomes.values()) == {0}
    counts.stored(TIMES, "succeeded", lambda: done.append(str(counts.outcomes["fake", "embed", "succeeded"])))
    counts.stored(TIMES._replace(model=UNKNOWN, ended_s=0.0), "failed", lambda: done.append("acknowledged"))
    assert done == ["1", "acknowledged"], "counted first: a scrape after the acknowledgement must see it"
    assert {key: number for key, number in counts.outcomes.items() if number} == {
        ("fake", "embed", "succeeded"): 1,
        (UNKNOWN, "embed", "failed"): 1,
    }
    assert counts.num_ended == 2
    assert [stage.up_to()[-1] for stage in counts.stages["fake"]] == [1, 1, 1, 1]
    assert [round(stage.total, 3) for stage in counts.stages["fake"][:3]] == [0.02, 0.004, 0.3]


def test_a_revoked_job_is_counted_wherever_celery_drops_it() -> None:
    counts = JobCounts(["fake"])
    for task in (tasks.embed, tasks.rerank):
        task_revoked.send(sender=task, request=None, terminated=False, signum=None, expired=False)
    assert [counts.outcomes[UNKNOWN, kind, "revoked"] for kind in ("embed", "rerank")] == [1, 1]


@pytest.mark.parametrize(
    ("traced", "outcome"),
    [
        ((False, "a result", 0.1), "succeeded"),
        ((True, ValueError("wrong"), 0.1), "failed"),
        ((True, SimpleNamespace(exception=ValueError("wrong")), 0.1), "failed"),
        ((True, SimpleNamespace(exception=Retry("later")), 0.1), "retried"),
        ((True, SimpleNamespace(exception=SimpleNamespace(exc=Retry("later"))), 0.1), "retried"),
    ],
)
def test_the_outcome_is_read_from_what_the_tracer_returns(traced: Any, outcome: str) -> None:
    assert outcome_of(traced) == outcome


def test_labels_come_from_our_tasks_and_models_alone() -> None:
    assert [kind_of(task) for task in (tasks.embed, tasks.rerank, SimpleNamespace(name="tasks.made-up"), None)] == [
        "embed",
        "rerank",
        "other",
        "other",
    ]
    assert times_of(None, tasks.embed) == Times(UNKNOWN, "embed", 0.0, 0.0, 0.0, 0.0, 0)
    job = job_of(FakeModel("one"), 1)
    job.waited_s, job.encoded_s, job.num_tokens = 1.0, 2.0, 7
    assert times_of(job, tasks.rerank) == Times("one", "rerank", 1.0, 2.0, 0.0, 0.0, 7)
