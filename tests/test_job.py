"""One call on its way: its slices, its rows in their places, its one answer."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import Any

import numpy as np
import pytest

from embedq.core.batching.job import MAX_INTERACTIVE_ROWS, SLICE, Call, Job
from embedq.core.sequence import Wanted
from tests.checkpoints import FakeModel
from tests.loops import DENSE, job_of


def rows(*values: float) -> dict[str, np.ndarray]:
    """A batch's dense rows, of one component each."""
    return {"dense": np.array(values, np.float32)[:, np.newaxis]}


def test_rows_of_several_batches_become_one_result_in_the_jobs_order() -> None:
    job = job_of(FakeModel(), 3)
    first, second = rows(10, 11), rows(20)
    job.deliver(2, 0, first, is_shared=False)
    job.deliver(0, 1, first, is_shared=False)
    assert not job.is_over
    job.deliver(1, 0, second, is_shared=False)
    assert [float(row[0]) for row in job.answer.result(0)["dense"]] == [11, 20, 10]


def test_a_job_without_rows_is_answered_when_it_is_opened() -> None:
    assert job_of(FakeModel(), 0).answer.result(0) == {"dense": []}


def test_every_row_is_in_one_slice() -> None:
    job = job_of(FakeModel(), 2 * SLICE + 1)
    slices = [job.take_slice() for _ in range(4)]
    assert [(one.start, one.stop) for one in slices[:3]] == [
        (0, SLICE),
        (SLICE, 2 * SLICE),
        (2 * SLICE, 2 * SLICE + 1),
    ]
    assert slices[3].start == slices[3].stop


@pytest.mark.parametrize(
    "row", ["x" * 100_000, ("q", "x" * 99_999), (True, "x" * 100_000)], ids=["text", "pair", "side"]
)
def test_a_slice_of_long_texts_ends_before_it_keeps_a_thread_for_long(row: Any) -> None:
    job = job_of(FakeModel(), 12)
    job.call.rows[:] = [row] * 12
    slices = [job.take_slice() for _ in range(3)]
    assert [(one.start, one.stop) for one in slices] == [(0, 5), (5, 10), (10, 12)]


@pytest.mark.parametrize(
    ("num_rows", "is_bulk", "becomes_bulk"),
    [(MAX_INTERACTIVE_ROWS, False, False), (MAX_INTERACTIVE_ROWS + 1, False, True), (1, True, True)],
)
def test_a_large_job_is_bulk_whatever_its_priority(num_rows: int, is_bulk: bool, becomes_bulk: bool) -> None:
    assert job_of(FakeModel(), num_rows, is_bulk=is_bulk).is_bulk == becomes_bulk


def test_the_first_answer_stands() -> None:
    failed, cancelled = job_of(FakeModel(), 1), job_of(FakeModel(), 1)
    failed.fail(ValueError("first"))
    cancelled.answer.cancel()
    for job in (failed, cancelled):
        job.fail(ValueError("second"))
        job.deliver(0, 0, rows(1), is_shared=False)
    assert str(failed.answer.exception(0)) == "first"
    with pytest.raises(CancelledError):
        cancelled.answer.result(0)


def test_a_result_that_cannot_be_made_is_the_jobs_failure() -> None:
    def finish(given: dict[str, list[Any]]) -> Any:
        raise ValueError("of what was computed")

    job = Job(lambda: Call(FakeModel(), Wanted(DENSE), [0], lambda rows: [], finish), is_bulk=False)
    job.open()
    job.deliver(0, 0, rows(1), is_shared=False)
    assert str(job.answer.exception(0)) == "of what was computed"


def test_it_is_told_once_that_it_started_even_if_telling_fails(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    def start() -> None:
        told.append("started")
        raise RuntimeError("of the application")

    job = job_of(FakeModel(), 2, on_started=start)
    job.start()
    job.deliver(0, 0, rows(1, 2), is_shared=False)
    job.deliver(1, 1, rows(1, 2), is_shared=False)
    assert told == ["started"]
    assert len(job.answer.result(0)["dense"]) == 2
    assert [vars(record)["action"] for record in caplog.records] == ["callback_failed"]


def test_a_row_that_others_get_too_is_copied() -> None:
    job, outputs = job_of(FakeModel(), 2), rows(1, 2)
    job.deliver(0, 0, outputs, is_shared=True)
    job.deliver(1, 1, outputs, is_shared=False)
    outputs["dense"][:] = 9
    assert [float(row[0]) for row in job.answer.result(0)["dense"]] == [1, 9]
