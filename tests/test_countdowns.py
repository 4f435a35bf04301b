"""Jobs that wait for their countdown: they keep no other job waiting, however many there are, and stay Celery's jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis
from celery.result import AsyncResult
from celery.worker import state

from embedq import tasks
from embedq.workers.jobs.held_job import HeldJobs
from tests.checkpoints import FakeModel
from tests.engines import running
from tests.pools import TIMEOUT_S, TINY, environment
from tests.running import start_workers
from tests.test_request import request_of

MAX_JOBS = 3
COUNTDOWN_S = 8


@pytest.fixture(scope="module")
def crowded(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a model whose worker holds at most `MAX_JOBS` jobs."""
    with environment(server, "crowded", TINY, tmp_path_factory.mktemp("crowded")) as variables:
        running = start_workers(variables | {"EMBEDQ_MAX_JOBS": str(MAX_JOBS)}, "--cpu-workers", "1")
        try:
            yield "crowded"
        finally:
            running.stop()


def send_later(model: str, count: int) -> list[AsyncResult]:
    return [tasks.embed.apply_async((["later"],), {"model": model}, countdown=COUNTDOWN_S) for _ in range(count)]


def test_jobs_with_a_countdown_keep_no_other_waiting_and_run_in_time(server: str, crowded: str) -> None:
    sent_s = time.monotonic()
    later = send_later(crowded, 5 * MAX_JOBS)
    for _ in range(3):
        tasks.embed.delay(["now"], model=crowded).get(timeout=TIMEOUT_S)
    assert time.monotonic() - sent_s < COUNTDOWN_S
    assert not any(job.ready() for job in later)
    with redis.Redis.from_url(server) as client:
        assert client.zcard("embedq:delayed") == len(later) - MAX_JOBS
    for job in later:
        assert len(job.get(timeout=TIMEOUT_S)) == 1
    assert COUNTDOWN_S <= time.monotonic() - sent_s < 2 * COUNTDOWN_S


def test_a_delayed_job_can_be_revoked_wherever_it_waits(server: str, crowded: str) -> None:
    later = send_later(crowded, 2 * MAX_JOBS)
    tasks.embed.delay(["now"], model=crowded).get(timeout=TIMEOUT_S)
    for job in (later[0], later[-1]):  # held by the worker, and on the server
        job.revoke()
    for job in later[1:-1]:
        job.get(timeout=TIMEOUT_S)
    assert [job.get(timeout=TIMEOUT_S, propagate=False) and job.state for job in (later[0], later[-1])] == [
        "REVOKED"
    ] * 2


@pytest.fixture
def held() -> Iterator[HeldJobs]:
    """The jobs of a worker with room for `MAX_JOBS`."""
    with running(FakeModel(), max_jobs=MAX_JOBS) as engine:
        jobs = HeldJobs(engine)
        jobs.is_open = True
        yield jobs
    state.reset_state()


def test_scheduled_jobs_leave_room_for_others_up_to_as_many(held: HeldJobs) -> None:
    kept = []
    rooms = []
    for number in range(MAX_JOBS + 2):
        room = held.room()
        rooms.append((room.max_jobs, room.max_delayed))
        kept.append(request_of(id=f"job {number}"))
        state.task_scheduled(kept[-1])
    assert rooms == [(3, 3), (3, 2), (3, 1), (3, 0), (2, 0)]
    state.task_reserved(kept[0])  # its time has come
    assert held.room().max_jobs == 1
