"""What a pool counts of its jobs: how large they are by queue, and for how long there were any."""

from __future__ import annotations

import sys
import threading

import pytest

from embedq.workers.monitoring.job_counters import UNKNOWN, Counts, JobCounts


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
